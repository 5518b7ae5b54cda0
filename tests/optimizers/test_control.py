"""A run whose hyperparameters change while it trains is what the `schedulefree` package's is then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flats import random_gradients
from freestep.api.control import ControlRequest
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.control import Control, ControlChange
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from optimizers.test_parity import BOUNDS, METHODS, Package, document, through_a_checkpoint, weights

STEPS = 240
RATES = {40: 3.0, 110: 0.2, 170: 1.7}
"""From which step on the learning rate is how many times what it was created with: up, far down, and up again."""
H: dict[str, dict[str, Any]] = {
    "sgd_schedule_free": {"lr": 0.02, "warmup_steps": 60, "weight_decay": 0.05, "r": 1.0},
    "adamw_schedule_free": {"lr": 0.004, "warmup_steps": 20},
    "radam_schedule_free": {"lr": 0.004, "weight_lr_power": 1.0},
    "schedule_free_wrapper": {"base": {"algorithm": "sgd", "lr": 0.02, "momentum": 0.9}},
}


def rates(h: dict[str, Any], factor: float) -> dict[str, Any]:
    """The hyperparameters with another rate."""
    return {"base": {"lr": h["base"]["lr"] * factor}} if "base" in h else {"lr": h["lr"] * factor}


def rate(h: dict[str, Any]) -> float:
    return float(h["base"]["lr"] if "base" in h else h["lr"])


@pytest.mark.parametrize("algorithm", H)
def test_points_and_weights_equal_the_packages_when_the_rate_changes(algorithm: str) -> None:
    """Its largest rate so far goes on counting for the weights in the average, also where the rate has fallen."""
    make, _, second = METHODS[algorithm]
    h, spec = H[algorithm], document(algorithm, H[algorithm], second)
    truth, peer = (Package(make, h, second, dtype) for dtype in (torch.float64, torch.float32))
    made, control = Shard(spec, Manifest.of(spec), torch.device("cpu")), Control()
    made.initialize(torch.cat([weight.reshape(-1) for weight in weights().values()]), epoch=1)
    for number, gradients in enumerate(random_gradients(STEPS)):
        if (factor := RATES.get(number)) is not None:
            wish = ControlRequest(optimizer=rates(h, factor), groups={"second": rates(second, factor)})
            control = control.after(spec, wish, "")
            made.apply(Entry(made.seq + 1, made.epoch, advance=False, control=ControlChange(control, "{}", "me")))
            for package in (truth, peer):
                for group, own in zip(package.optimizer.param_groups, (h, second), strict=True):
                    group["lr"] = rate(own) * factor
        truth.step(gradients)
        peer.step(gradients)
        flat = torch.cat([gradients[name].reshape(-1) for name in weights()])
        made.apply(Entry(made.seq + 1, made.epoch, advance=True, gradient=flat))
        if number == 130:
            made = through_a_checkpoint(made, spec)
    for group, own in zip(truth.optimizer.param_groups, ("default", "second"), strict=True):
        scalars = made.copy_state().scalars[own]
        assert scalars["lr_max"] == pytest.approx(group["lr_max"], rel=1e-12)
        assert scalars["weight_sum"] == pytest.approx(group["weight_sum"], rel=1e-12)
        assert scalars["lr_max"] > scalars["scheduled_lr"]
    for point in ("x", "y"):
        expected, out = truth.point(point), torch.empty(made.manifest.numel)
        made.copy_point(point, out)  # type: ignore[arg-type]
        own_error = (peer.point(point).double() - expected).abs().max()
        allowed = torch.clamp(BOUNDS["atol"] + BOUNDS["rtol"] * expected.abs(), min=float(2 * own_error))
        assert ((out.double() - expected).abs() <= allowed).all()


def advanced(spec: RunSpec, steps: int) -> Shard:
    """A shard after some steps, of gradients that are as stale as those of five workers."""
    made = Shard(spec, Manifest.of(spec), torch.device("cpu"))
    made.initialize(torch.cat([weight.reshape(-1) for weight in weights().values()]), epoch=1)
    for gradients in random_gradients(steps):
        push(made, torch.cat([gradients[name].reshape(-1) for name in weights()]))
    return made


def push(made: Shard, gradient: Tensor) -> None:
    made.apply(Entry(made.seq + 1, made.epoch, advance=True, gradient=gradient, staleness=4, live=5))


def stand_still(made: Shard, spec: RunSpec, **optimizer: Any) -> None:
    """Changes a shard's hyperparameters, and takes a step of length 0."""
    control = Control().after(spec, ControlRequest(optimizer={"lr": 0.0, **optimizer}), "")
    made.apply(Entry(made.seq + 1, made.epoch, advance=False, control=ControlChange(control, "{}", "me")))
    push(made, torch.ones(made.manifest.numel))


def point(made: Shard, name: Any) -> Tensor:
    out = torch.empty(made.manifest.numel)
    made.copy_point(name, out)
    return out


@pytest.mark.parametrize(
    ("rule", "wish"),
    [
        ("auto", {"name": "none"}),
        ("auto", {"name": "constant", "expected_staleness": 40}),
        ("ahead", {"expected_staleness": 40}),
        ("ahead", {"expected_staleness": 0}),
    ],
)
def test_y_stays_where_it_is_when_the_delay_correction_changes(rule: str, wish: dict[str, Any]) -> None:
    spec = document("adamw_schedule_free", {"lr": 0.01, "delay_correction": {"name": rule}}, {})
    made = advanced(spec, 60)
    kept, x = through_a_checkpoint(made, spec), point(made, "x")
    stand_still(made, spec, delay_correction=wish)
    stand_still(kept, spec)
    (changed, y), (as_before, expected) = (
        # As y is made, but of the x from before the step, which takes up some of z however long it is.
        (scalars["staleness"], x + (1 - scalars["beta"]) * (point(each, "z") - x))
        for each in (made, kept)
        for scalars in [each.copy_state().scalars["default"]]
    )
    assert changed != as_before == 4
    assert not torch.allclose(point(made, "z"), point(kept, "z"), rtol=0.01)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_a_state_goes_on_under_another_rule_with_the_x_that_it_has() -> None:
    """As one that is imported with another spec: y follows with the next step, as where β changes."""
    spec, other = (
        document("adamw_schedule_free", {"lr": 0.01, "delay_correction": {"name": name}}, {})
        for name in ("auto", "ahead")
    )
    made = advanced(spec, 60)
    x, made = point(made, "x"), through_a_checkpoint(made, other)
    assert torch.equal(point(made, "x"), x)
    stand_still(made, other)
    scalars, z = made.copy_state().scalars["default"], point(made, "z")
    torch.testing.assert_close(point(made, "x"), x + scalars["c"] * (z - x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(point(made, "y"), z + scalars["beta"] * (point(made, "x") - z), rtol=1e-5, atol=1e-6)


def test_x_stays_where_it_is_when_beta_changes() -> None:
    """The package's x would jump: it is made of y and z by the newest β. Here y follows, with the next step."""
    spec = document("adamw_schedule_free", {"lr": 0.01}, {})
    made = Shard(spec, Manifest.of(spec), torch.device("cpu"))
    made.initialize(torch.cat([weight.reshape(-1) for weight in weights().values()]), epoch=1)
    gradients = [torch.cat([each[name].reshape(-1) for name in weights()]) for each in random_gradients(20)]
    for gradient in gradients:
        made.apply(Entry(made.seq + 1, 1, advance=True, gradient=gradient))
    before, after = (torch.empty(made.manifest.numel) for _ in range(2))
    made.copy_point("x", before)
    control = Control().after(spec, ControlRequest(optimizer={"betas": [0.6, 0.999]}), "")
    made.apply(Entry(made.seq + 1, 1, advance=False, control=ControlChange(control, "{}", "me")))
    made.copy_point("x", after)
    assert torch.equal(before, after)
    # A step of length 0 moves nothing but y, to where the new beta has it.
    still = control.after(spec, ControlRequest(optimizer={"lr": 0.0}), "")
    made.apply(Entry(made.seq + 1, 1, advance=False, control=ControlChange(still, "{}", "me")))
    z, y = (torch.empty(made.manifest.numel) for _ in range(2))
    made.copy_point("z", z)
    made.apply(Entry(made.seq + 1, 1, advance=True, gradient=gradients[0]))
    made.copy_point("x", after)
    made.copy_point("y", y)
    torch.testing.assert_close(y, z + 0.6 * (after - z), rtol=1e-5, atol=1e-6)
