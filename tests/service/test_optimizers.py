"""The methods against the packages they are named after, and against the plain reference."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from freestep.models import ALGORITHMS, RunSpec
from freestep.wire import Manifest
from freestep_service.optimizers import METHODS, initial_buffers, interpolate, norm, segments, step
from freestep_service.optimizers.sweep import CHUNK
from reference import ScheduleFree

STEPS = 250
SHAPES = {"matrix": (7, 5), "scalar": (), "empty": (0, 4), "cube": (3, 5, 7), "vector": (13,)}
GROUPS = {"matrix": "default", "scalar": "second", "empty": "second", "cube": "default", "vector": "second"}
"""The groups alternate, so that a group has several segments."""
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


class Flat:
    """A run's state vectors, driven as the shard drives them."""

    def __init__(self, optimizer: dict[str, Any], second: dict[str, Any], weights: dict[str, Tensor]) -> None:
        spec = RunSpec.model_validate(
            {
                "optimizer": optimizer,
                "parameters": [
                    {"name": name, "shape": list(weight.shape), "group": GROUPS.get(name, "default")}
                    for name, weight in weights.items()
                ],
                "groups": {"second": second},
            }
        )
        self.slots = Manifest(spec.parameters).slots
        self.method = METHODS[spec.optimizer.algorithm]
        self.layout = segments(self.slots)
        self.hyperparameters = {each.group: spec.hyperparameters(each.group) for each in self.layout}
        self.buffers = initial_buffers(self.method, self.join(weights))
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[slot.name].reshape(-1) for slot in self.slots])

    def step(self, gradients: dict[str, Tensor], **options: float) -> None:
        self.scalars = step(
            self.method,
            self.layout,
            self.hyperparameters,
            self.scalars,
            self.buffers,
            self.join(gradients),
            **options,
        )

    def point(self, name: str) -> dict[str, Tensor]:
        out = torch.empty_like(self.buffers["y"])
        interpolate(self.method, self.layout, self.hyperparameters, self.buffers, name, out)  # type: ignore[arg-type]
        return {slot.name: out[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots}


def initial_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def random_gradients(count: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torch_groups(parameters: dict[str, nn.Parameter], second: dict[str, Any]) -> list[dict[str, Any]]:
    first = [parameter for name, parameter in parameters.items() if GROUPS[name] == "default"]
    other = [parameter for name, parameter in parameters.items() if GROUPS[name] == "second"]
    return [{"params": first}, {"params": other, **second}]


def assert_points(actual: dict[str, Tensor], expected: dict[str, nn.Parameter]) -> None:
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter.detach(), **TOLERANCE)


SECOND = {"lr": 0.003, "weight_decay": 0.0}
SCHEDULE_FREE = [
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.05}),
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.05, "momentum": 0.6, "weight_decay": 0.02, "r": 1.0}),
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.1, "warmup_steps": 60, "weight_lr_power": 1.0}),
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.0}),
    ("adamw_schedule_free", schedulefree.AdamWScheduleFree, {"lr": 0.01}),
    (
        "adamw_schedule_free",
        schedulefree.AdamWScheduleFree,
        {"lr": 0.02, "betas": (0.95, 0.98), "weight_decay": 0.1, "warmup_steps": 50, "r": 0.5, "eps": 1e-6},
    ),
    ("adamw_schedule_free", schedulefree.AdamWScheduleFree, {"lr": 0.01, "weight_lr_power": 0.0, "r": 2.0}),
    ("radam_schedule_free", schedulefree.RAdamScheduleFree, {"lr": 0.01}),
    (
        "radam_schedule_free",
        schedulefree.RAdamScheduleFree,
        {"lr": 0.01, "silent_sgd_phase": False, "weight_decay": 0.05, "r": 1.0},
    ),
    (
        "radam_schedule_free",
        schedulefree.RAdamScheduleFree,
        {"lr": 0.01, "betas": (0.9, 0.5), "silent_sgd_phase": False},
    ),
    ("radam_schedule_free", schedulefree.RAdamScheduleFree, {"lr": 0.01, "betas": (0.9, 0.5)}),
    ("adamw_schedule_free", schedulefree.AdamWScheduleFree, {"lr": 0.0, "weight_lr_power": 0.0}),
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.05, "momentum": 0.98, "weight_lr_power": 0.0}),
]


@pytest.mark.parametrize(("algorithm", "package", "hyperparameters"), SCHEDULE_FREE)
def test_x_and_y_are_those_of_the_schedulefree_package(
    algorithm: str, package: type[Any], hyperparameters: dict[str, Any]
) -> None:
    parameters = {name: nn.Parameter(weight) for name, weight in initial_weights().items()}
    peer = package(torch_groups(parameters, SECOND), **hyperparameters)
    peer.train()
    flat = Flat({"algorithm": algorithm, **hyperparameters}, SECOND, initial_weights())
    for number, gradients in enumerate(random_gradients(STEPS), start=1):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        peer.step()
        flat.step(gradients)
        if number in (1, 7, 60, STEPS):
            assert_points(flat.point("y"), parameters)
            peer.eval()
            assert_points(flat.point("x"), parameters)
            peer.train()


TORCH = [
    ("sgd", torch.optim.SGD, {"lr": 0.05}),
    ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}),
]


@pytest.mark.parametrize("warmup_steps", [0, 40])
@pytest.mark.parametrize(("algorithm", "package", "hyperparameters"), TORCH)
def test_the_baselines_are_those_of_torch(
    algorithm: str, package: type[Any], hyperparameters: dict[str, Any], warmup_steps: int
) -> None:
    parameters = {name: nn.Parameter(weight) for name, weight in initial_weights().items()}
    peer = package(torch_groups(parameters, SECOND), **hyperparameters)
    spec = {"algorithm": algorithm, **hyperparameters, "schedule": {"name": "constant", "warmup_steps": warmup_steps}}
    flat = Flat(spec, SECOND, initial_weights())
    lrs = [group["lr"] for group in peer.param_groups]
    for k, gradients in enumerate(random_gradients(STEPS)):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        for group, lr in zip(peer.param_groups, lrs, strict=True):
            group["lr"] = lr * min(1.0, (k + 1) / warmup_steps) if warmup_steps else lr
        peer.step()
        flat.step(gradients)
    for point in ("x", "y", "z"):
        assert_points(flat.point(point), parameters)


REFERENCE = [
    ({"algorithm": "sgd_schedule_free", "lr": 0.05, "momentum": 0.8, "weight_decay": 0.01, "warmup_steps": 30}, 0.8),
    ({"algorithm": "adamw_schedule_free", "lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "r": 1.0}, 0.9),
    ({"algorithm": "radam_schedule_free", "lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}, 0.8),
    ({"algorithm": "radam_schedule_free", "lr": 0.01, "betas": (0.9, 0.9), "silent_sgd_phase": False}, 0.9),
]


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(("optimizer", "beta"), REFERENCE)
def test_the_sweep_is_the_paper(optimizer: dict[str, Any], beta: float, damped: bool) -> None:
    names = ("lr", "weight_decay", "warmup_steps", "r", "silent_sgd_phase")
    options = {name: optimizer[name] for name in names if name in optimizer}
    options["adaptive"] = optimizer["algorithm"] == "adamw_schedule_free"
    options["rectified"] = optimizer["algorithm"] == "radam_schedule_free"
    options["beta2"] = optimizer.get("betas", (0, 0.999))[1]
    weights = initial_weights()
    reference = {name: ScheduleFree(weight, beta=beta, **options) for name, weight in weights.items()}
    flat = Flat(optimizer, {}, weights)
    # The same arithmetic in fp64 leaves the algebra alone to differ.
    exact = Flat(optimizer, {}, {name: weight.double() for name, weight in weights.items()})
    for number, gradients in enumerate(random_gradients(STEPS)):
        damping = 1 / (1 + number % 5) if damped else 1.0
        flat.step(gradients, damping=damping)
        exact.step({name: gradient.double() for name, gradient in gradients.items()}, damping=damping)
        for name, twin in reference.items():
            twin.step(gradients[name], damping)
    for name, twin in reference.items():
        for point, expected in (("x", twin.x), ("y", twin.y), ("z", twin.z)):
            torch.testing.assert_close(flat.point(point)[name], expected.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(exact.point(point)[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", METHODS)
def test_damping_leaves_the_averaging_weights_alone(algorithm: str) -> None:
    plain, damped = (Flat({"algorithm": algorithm, "lr": 0.1}, {}, initial_weights()) for _ in range(2))
    for gradients in random_gradients(10):
        plain.step(gradients)
        damped.step(gradients, damping=0.25)
    assert damped.scalars == plain.scalars
    assert not torch.equal(damped.buffers["y"], plain.buffers["y"])


@pytest.mark.parametrize("algorithm", METHODS)
def test_chunks_do_not_show(algorithm: str) -> None:
    numel = 2 * CHUNK + 17
    weights = {"long": torch.randn(numel, generator=torch.Generator().manual_seed(2))}
    whole, chunked = (Flat({"algorithm": algorithm, "lr": 0.1}, {}, weights) for _ in range(2))
    gradient = {"long": torch.randn(numel, generator=torch.Generator().manual_seed(3))}
    for _ in range(8):
        chunked.step(gradient)
        advanced, coefficients = whole.method.advance(whole.hyperparameters["default"], whole.scalars["default"], 1.0)
        whole.method.update(gradient["long"].clone(), whole.buffers, coefficients)
        whole.scalars = {"default": advanced}
    for name, buffer in whole.buffers.items():
        assert torch.equal(buffer, chunked.buffers[name])


def test_scale_multiplies_the_gradient() -> None:
    spec = {"algorithm": "sgd_schedule_free", "lr": 0.1}
    plain, scaled = (Flat(spec, {}, initial_weights()) for _ in range(2))
    for gradients in random_gradients(5):
        plain.step({name: 0.25 * gradient for name, gradient in gradients.items()})
        scaled.step(gradients, scale=0.25)
    for name, buffer in plain.buffers.items():
        assert torch.equal(buffer, scaled.buffers[name])


@pytest.mark.parametrize("algorithm", METHODS)
def test_scalars_are_data(algorithm: str) -> None:
    flat = Flat({"algorithm": algorithm}, {}, initial_weights())
    before = {group: dict(scalars) for group, scalars in flat.scalars.items()}
    kept = dict(flat.scalars)
    flat.step(next(random_gradients(1)))
    assert {group: dict(scalars) for group, scalars in kept.items()} == before
    assert flat.scalars["default"]["k"] == 1


def test_groups_make_as_few_segments_as_the_order_allows() -> None:
    flat = Flat({"algorithm": "sgd"}, {}, initial_weights())
    assert [(each.group, each.end - each.begin) for each in flat.layout] == [
        ("default", 35),
        ("second", 1),
        ("default", 105),
        ("second", 13),
    ]


def test_a_narrow_point_is_the_wide_one_rounded() -> None:
    flat = Flat({"algorithm": "adamw_schedule_free"}, {}, initial_weights())
    for gradients in random_gradients(3):
        flat.step(gradients)
    wide, narrow = torch.empty(flat.buffers["y"].numel()), torch.empty(flat.buffers["y"].numel(), dtype=torch.bfloat16)
    for out in (wide, narrow):
        interpolate(flat.method, flat.layout, flat.hyperparameters, flat.buffers, "x", out)
    assert torch.equal(wide.bfloat16(), narrow)


def test_norm_is_the_2_norm() -> None:
    vector = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(4))
    assert norm(vector) == pytest.approx(float(vector.double().norm()), rel=1e-6)
    assert norm(torch.empty(0)) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, CHUNK, 2 * CHUNK])
def test_norm_finds_what_is_not_finite(value: float, place: int) -> None:
    vector = torch.zeros(2 * CHUNK + 1)
    vector[place] = value
    assert norm(vector) is None


def test_norm_of_large_finite_values_is_finite() -> None:
    vector = torch.full((10,), 1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm(vector) == pytest.approx(1e30 * 10**0.5, rel=1e-6)


JUST_BELOW_1 = math.nextafter(1, 0)
EXTREMES = {
    "lr": (0.0, 5e-324, 1e12),
    "weight_decay": (0.0, 1e12),
    "dampening": (0.0, 1e12),
    "eps": (1e-30, 1e12),
    "r": (0.0, 10.0),
    "weight_lr_power": (0.0, 10.0),
    "momentum": (1e-6, JUST_BELOW_1),
    "betas": ((1e-6, 1e-6), (1e-6, JUST_BELOW_1), (JUST_BELOW_1, 1e-6), (JUST_BELOW_1, JUST_BELOW_1)),
    "warmup_steps": (0, 2**53 - 1),
    "schedule": ({"warmup_steps": 0}, {"warmup_steps": 2**53 - 1}),
    "nesterov": (False,),
    "silent_sgd_phase": (False, True),
}


@pytest.mark.parametrize("algorithm", METHODS)
def test_no_hyperparameter_that_a_spec_allows_makes_a_step_fail(algorithm: str) -> None:
    """A step that fails halfway leaves the vectors torn; and a weight of 0 with gradient 0 must not become NaN."""
    names = [name for name in ALGORITHMS[algorithm].model_fields if name in EXTREMES]
    for values in itertools.product(*(EXTREMES[name] for name in names)):
        flat = Flat(
            {"algorithm": algorithm, **dict(zip(names, values, strict=True))}, {}, {"w": torch.tensor([0.0, 1.0])}
        )
        for k in (0, 2**53 - 2):
            flat.scalars["default"] = {**flat.scalars["default"], "k": k}
            flat.step({"w": torch.tensor([0.0, 1e3])})
            assert all(map(math.isfinite, flat.scalars["default"].values()))
            assert flat.point("x")["w"][0] == 0
