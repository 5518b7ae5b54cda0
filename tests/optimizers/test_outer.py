"""DiLoCo's outer optimizer against torch's SGD, and delayed momentum against a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from flats import STEPS, Flat, assert_points, initial_weights, random_gradients, step_together, torch_groups
from freestep.api.hyperparameters import DiLoCo
from freestep.api.models import RunSpec
from reference import DelayedNesterov

SECOND = {"lr": 0.01, "momentum": 0.5}


@pytest.mark.parametrize(
    ("hyperparameters", "torchs"),
    [
        ({"lr": 0.05}, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        ({"lr": 0.05, "momentum": 0.8, "nesterov": False}, {"lr": 0.05, "momentum": 0.8}),
    ],
)
def test_the_outer_optimizer_equals_torchs_sgd(hyperparameters: dict[str, Any], torchs: dict[str, Any]) -> None:
    parameters = {name: nn.Parameter(weight) for name, weight in initial_weights().items()}
    peer = torch.optim.SGD(torch_groups(parameters, SECOND), **torchs)
    flat = Flat({"algorithm": "diloco", **hyperparameters}, SECOND, initial_weights())
    for gradients in random_gradients(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        peer.step()
        flat.step(gradients)
    for point in ("x", "y", "z"):
        assert_points(flat.point(point), parameters)


def test_without_momentum_a_step_is_along_the_gradient() -> None:
    weights = initial_weights()
    flat = Flat({"algorithm": "diloco", "lr": 1.0, "momentum": 0.0}, {}, weights)
    gradients = next(random_gradients(1))
    flat.step(gradients)
    for name, y in flat.point("y").items():
        assert torch.equal(y, weights[name] - gradients[name])


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(
    ("period", "activation"), [(1, 0.0), (1, 0.7), (2, 0.0), (3, 0.2), (3, 1 / 3), (8, 0.05), (STEPS + 1, 0.0)]
)
def test_delayed_momentum_equals_the_papers(period: int, activation: float, damped: bool) -> None:
    hyperparameters = {"lr": 0.05, "momentum_period": period, "momentum_activation": activation}
    weights = initial_weights()
    twins = {
        name: DelayedNesterov(weight, lr=0.05, period=period, activation=activation) for name, weight in weights.items()
    }
    flat = Flat({"algorithm": "diloco", **hyperparameters}, {}, weights)
    exact = Flat(
        {"algorithm": "diloco", **hyperparameters}, {}, {name: weight.double() for name, weight in weights.items()}
    )
    step_together(flat, exact, twins, random_gradients(STEPS), damped)
    for name, twin in twins.items():
        torch.testing.assert_close(exact.point("y")[name], twin.y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flat.point("y")[name], twin.y.float(), rtol=1e-4, atol=1e-5)


def test_only_delayed_momentum_keeps_a_sum_of_gradients() -> None:
    plain, delayed = (
        Flat({"algorithm": "diloco", "momentum_period": period}, {}, initial_weights()) for period in (1, 2)
    )
    assert set(plain.buffers) == {"y", "momentum_buffer"}
    assert set(delayed.buffers) == {"y", "momentum_buffer", "gradient_sum"}


@pytest.mark.parametrize(
    ("hyperparameters", "field"),
    [
        ({"momentum_period": 0}, "momentum_period"),
        ({"momentum_period": 2, "nesterov": False}, "momentum_period"),
        ({"momentum_period": 4, "momentum_activation": 0.26}, "momentum_activation"),
        ({"momentum_activation": -0.1}, "momentum_activation"),
        ({"weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_an_invalid_hyperparameter_is_named(hyperparameters: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DiLoCo.model_validate(hyperparameters)
    assert caught.value.errors()[0]["loc"] == (field,)


def test_a_group_may_have_another_period_but_not_other_state_vectors() -> None:
    parameters = [{"name": "w", "shape": [2], "group": "other"}]

    def spec(period: int, other: int) -> dict[str, Any]:
        return {
            "optimizer": {"algorithm": "diloco", "momentum_period": period},
            "parameters": parameters,
            "groups": {"other": {"momentum_period": other}},
        }

    RunSpec.model_validate(spec(2, 3))
    with pytest.raises(ValidationError, match="changes which state the optimizer keeps"):
        RunSpec.model_validate(spec(2, 1))
