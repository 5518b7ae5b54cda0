"""The methods against the packages that they are named after, and against plain references."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from flats import STEPS, Flat, assert_points, initial_weights, random_gradients, step_together, torch_groups
from forms import FORMS
from freestep.api.hyperparameters import ScheduleFreeWrapper
from freestep_service.optimizers import interpolate
from reference import ScheduleFree

SECOND = {"lr": 0.003, "weight_decay": 0.02}
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
    (
        "adamw_schedule_free",
        schedulefree.AdamWScheduleFreeReference,
        {"lr": 0.01, "weight_decay": 0.1, "decay_at_z": True, "warmup_steps": 20},
    ),
    ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.05, "momentum": 0.98, "weight_lr_power": 0.0}),
]


@pytest.mark.parametrize(("algorithm", "package", "hyperparameters"), SCHEDULE_FREE)
def test_x_and_y_equal_the_schedulefree_packages(
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
        # The package's AdamW reference names no rate.
        if "scheduled_lr" in peer.param_groups[0]:
            rates = [flat.scalars[group]["scheduled_lr"] for group in ("default", "second")]
            assert rates == [group["scheduled_lr"] for group in peer.param_groups]
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
def test_the_baselines_equal_torchs(
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
    ({"algorithm": "adamw_schedule_free", "lr": 0.01, "weight_decay": 0.1, "inner_momentum": 0.8}, 0.9),
    (
        {
            "algorithm": "adamw_schedule_free",
            "lr": 0.01,
            "weight_decay": 0.1,
            "decay_at_z": True,
            "inner_momentum": 0.9,
            "averaging_constant": 50.0,
        },
        0.9,
    ),
    ({"algorithm": "adamw_schedule_free", "lr": 0.01, "betas": (0.8, 0.99), "averaging_constant": 3.0}, 0.8),
    ({"algorithm": "sgd_schedule_free", "lr": 0.05, "warmup_steps": 30, "averaging_constant": 30.0}, 0.9),
    ({"algorithm": "radam_schedule_free", "lr": 0.01, "averaging_constant": 10.0}, 0.9),
]


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(("optimizer", "beta"), REFERENCE)
def test_a_step_equals_the_papers(optimizer: dict[str, Any], beta: float, damped: bool) -> None:
    names = {field.name for field in dataclasses.fields(ScheduleFree)}
    options = {name: optimizer[name] for name in names if name in optimizer}
    options["adaptive"] = optimizer["algorithm"] == "adamw_schedule_free"
    options["rectified"] = optimizer["algorithm"] == "radam_schedule_free"
    options["beta2"] = optimizer.get("betas", (0, 0.999))[1]
    weights = initial_weights()
    reference = {name: ScheduleFree(weight, beta=beta, **options) for name, weight in weights.items()}
    flat = Flat(optimizer, {}, weights)
    # The same arithmetic in fp64 leaves the algebra alone to differ.
    exact = Flat(optimizer, {}, {name: weight.double() for name, weight in weights.items()})
    step_together(flat, exact, reference, random_gradients(STEPS), damped)
    for name, each in reference.items():
        for point, expected in (("x", each.x), ("y", each.y), ("z", each.z)):
            torch.testing.assert_close(flat.point(point)[name], expected.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(exact.point(point)[name], expected, rtol=1e-10, atol=1e-12)


def rate(flat: Flat) -> float:
    """The learning rate of the newest step."""
    return flat.scalars["default"]["scheduled_lr"]


def without_rate(flat: Flat) -> dict[str, float]:
    """The other scalars of the default group."""
    return {name: value for name, value in flat.scalars["default"].items() if name != "scheduled_lr"}


@pytest.mark.parametrize("form", FORMS)
def test_damping_does_not_change_the_averaging_weights(form: str) -> None:
    plain, damped = (Flat(FORMS[form], {}, initial_weights()) for _ in range(2))
    for gradients in random_gradients(10):
        plain.step(gradients)
        damped.step(gradients, damping=0.25)
    assert without_rate(damped) == without_rate(plain)
    assert rate(damped) == rate(plain) / 4
    assert not torch.equal(damped.buffers["y"], plain.buffers["y"])


@pytest.mark.parametrize(
    "form", sorted(FORMS.keys() - {"schedule_free_wrapper-rprop", "schedule_free_wrapper-adagrad"})
)
def test_a_bound_on_the_learning_rate_acts_like_a_damping(form: str) -> None:
    """For a constant learning rate: Rprop has none, and Adagrad's decays."""
    weights = {name: weight.double() for name, weight in initial_weights().items()}
    plain, loose, damped, bounded = (Flat(FORMS[form], {}, weights) for _ in range(4))
    h = bounded.hyperparameters["default"]
    lr = h.base.lr if isinstance(h, ScheduleFreeWrapper) else h.lr
    for gradients in random_gradients(10):
        exact = {name: gradient.double() for name, gradient in gradients.items()}
        plain.step(exact)
        loose.step(exact, max_lr=lr)
        damped.step(exact, damping=1 / 4)
        bounded.step(exact, max_lr=lr / 4)
    assert without_rate(bounded) == without_rate(plain)
    assert rate(bounded) == rate(damped) == rate(plain) / 4
    assert torch.equal(loose.buffers["y"], plain.buffers["y"])
    torch.testing.assert_close(bounded.buffers["y"], damped.buffers["y"], rtol=1e-12, atol=1e-12)
    assert not torch.equal(bounded.buffers["y"], plain.buffers["y"])


def test_a_bound_on_the_learning_rate_bounds_the_steps_of_rprop() -> None:
    weights = initial_weights()
    flat = Flat({**FORMS["schedule_free_wrapper-rprop"], "weight_decay_at_y": 0.0}, {}, weights)
    sizes = []
    for gradients in random_gradients(4):
        before = flat.buffers["z"].clone()
        flat.step(gradients, max_lr=1e-4)
        sizes.append(float((flat.buffers["z"] - before).abs().max()))
    assert max(sizes) == pytest.approx(1e-4, rel=1e-2)
    assert flat.buffers["step_size"].max() > 1e-3


def test_scale_multiplies_the_gradient() -> None:
    spec = {"algorithm": "sgd_schedule_free", "lr": 0.1}
    plain, scaled = (Flat(spec, {}, initial_weights()) for _ in range(2))
    for gradients in random_gradients(5):
        plain.step({name: 0.25 * gradient for name, gradient in gradients.items()})
        scaled.step(gradients, scale=0.25)
    for name, buffer in plain.buffers.items():
        assert torch.equal(buffer, scaled.buffers[name])


@pytest.mark.parametrize("form", FORMS)
def test_scalars_are_plain_numbers(form: str) -> None:
    flat = Flat(FORMS[form], {}, initial_weights())
    before = {group: dict(scalars) for group, scalars in flat.scalars.items()}
    kept = dict(flat.scalars)
    flat.step(next(random_gradients(1)))
    assert {group: dict(scalars) for group, scalars in kept.items()} == before
    assert flat.scalars["default"]["k"] == 1


def test_neighbours_of_one_group_are_one_segment() -> None:
    flat = Flat({"algorithm": "sgd"}, {}, initial_weights())
    assert [(each.group, each.end - each.begin) for each in flat.layout] == [
        ("default", 35),
        ("second", 1),
        ("default", 105),
        ("second", 13),
    ]


def test_a_narrow_point_is_the_fp32_one_rounded() -> None:
    flat = Flat({"algorithm": "adamw_schedule_free"}, {}, initial_weights())
    for gradients in random_gradients(3):
        flat.step(gradients)
    wide, narrow = torch.empty(flat.buffers["y"].numel()), torch.empty(flat.buffers["y"].numel(), dtype=torch.bfloat16)
    for out in (wide, narrow):
        interpolate(flat.method, flat.layout, flat.hyperparameters, flat.scalars, flat.buffers, "x", out)
    assert torch.equal(wide.bfloat16(), narrow)
