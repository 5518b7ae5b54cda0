"""ScheduleFreeWrapper beside the `schedulefree` package's; the bases that a run can have, and those that it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

import freestep
from beside_package import (
    SHAPES,
    STEPS,
    Home,
    assert_same,
    assert_same_groups,
    set_gradients,
    weights,
)
from flats import random_gradients
from freestep import FreestepError

BASES: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.3}, {"weight_decay_at_y": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.8}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}, {"r": 1.0, "weight_lr_power": 1.0}),
]


@pytest.mark.parametrize(("base", "options", "wrapped"), BASES)
def test_a_wrapper_is_the_packages(
    home: Home, base: Callable[..., torch.optim.Optimizer], options: dict[str, Any], wrapped: dict[str, Any]
) -> None:
    """Over bases that do not take the package's `z` for a state of theirs; it cannot swap scalars."""
    ours, theirs = weights(), weights()
    del ours["scalar"], theirs["scalar"]

    def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        first, *rest = parameters.values()
        return [{"params": [first], "lr": 0.05}, {"params": rest}]

    optimizer = home(freestep.ScheduleFreeWrapper, base(groups(ours), **options), **wrapped)
    other = schedulefree.ScheduleFreeWrapper(base(groups(theirs), **options), **wrapped)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, options["lr"]]
    for gradients in random_gradients(STEPS):
        optimizer.train()
        other.train()
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        optimizer.step()
        other.step()
        assert_same(ours, theirs)
        assert_same_groups(optimizer, other)
        optimizer.eval()
        other.eval()
        assert_same(ours, theirs)


def test_a_wrapper_of_sgd_is_the_sgd_form(home: Home) -> None:
    ours, theirs = weights(), weights()
    plain = home(freestep.SGDScheduleFree, ours.values(), lr=0.3, weight_decay=0.1)
    base = torch.optim.SGD(theirs.items(), lr=0.3)
    wrapper = home(freestep.ScheduleFreeWrapper, base, weight_decay_at_y=0.1)
    assert [slot.name for slot in wrapper._receive_buffer.manifest.slots] == list(SHAPES)
    for gradients in random_gradients(STEPS):
        for parameters, optimizer in ((ours, plain), (theirs, wrapper)):
            optimizer.train()
            set_gradients(parameters, gradients)
            optimizer.step()
        assert_same(ours, theirs)
        plain.eval()
        wrapper.eval()
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.1}),
        ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.5}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
        ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
        ("AdamW", {"lr": torch.tensor(0.125), "weight_decay": 0.5}),
        ("NAdam", {"lr": 0.1, "momentum_decay": 0.1}),
        ("RAdam", {"lr": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}),
        ("Adamax", {"lr": 0.1, "eps": 1e-6}),
        ("Rprop", {"lr": 0.1, "etas": (0.4, 1.5), "step_sizes": (1e-5, 1)}),
        ("Muon", {"lr": 0.1, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}),
    ],
)
def test_a_run_has_the_hyperparameters_of_any_base(base: str, options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    made = getattr(torch.optim, base)([parameter], **options)
    optimizer = freestep.ScheduleFreeWrapper(made, url="local")
    assert optimizer.spec.optimizer.algorithm == "schedule_free_wrapper"
    found = optimizer.spec.optimizer.base.model_dump()
    assert found.pop("algorithm") == base.lower()
    assert found == {name: made.param_groups[0][name] for name in found}
    assert optimizer.spec.groups == {}
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1


class Own(torch.optim.SGD):
    pass


def stepped() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    base = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    base.step()
    return base


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (lambda: Own([nn.Parameter(torch.ones(2))]), "Own"),
        (lambda: torch.optim.ASGD([nn.Parameter(torch.ones(2))]), "ASGD"),
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], maximize=True), "negate the loss"),
        (stepped, "has taken steps"),
        (lambda: torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], ns_coefficients=(9.0, 9.0, 9.0)), "ns_coeff"),
    ],
)
def test_a_base_that_a_run_cannot_have_is_refused(base: Callable[[], torch.optim.Optimizer], said: str) -> None:
    with pytest.raises(FreestepError, match=said):
        freestep.ScheduleFreeWrapper(base(), url="local")


@pytest.mark.parametrize("changed", ["wrapper", "base"])
def test_another_rate_at_a_wrapper_is_warned_about(changed: str, caplog: pytest.LogCaptureFixture) -> None:
    """Schedulers of the package's wrapper are attached to either."""
    parameter = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([parameter], lr=torch.tensor(0.5))
    optimizer = freestep.ScheduleFreeWrapper(base, url="local")
    for _ in range(2):
        parameter.grad = torch.ones(2)
        with caplog.at_level(logging.WARNING, "freestep"):
            optimizer.step()
    assert not caplog.records
    (optimizer if changed == "wrapper" else base).param_groups[0]["lr"] = 0.25
    for _ in range(3):
        parameter.grad = torch.ones(2)
        with caplog.at_level(logging.WARNING, "freestep"):
            optimizer.step()
    assert sum("no effect" in each.getMessage() for each in caplog.records) == 1
