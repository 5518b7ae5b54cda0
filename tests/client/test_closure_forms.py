"""The closure forms beside the `schedulefree` package's: x between steps, y for the closure, whatever fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

import freestep
from beside_package import (
    BOUNDS,
    SHAPES,
    Home,
    assert_same,
    assert_same_groups,
    assert_same_z,
    point,
    set_gradients,
    weights,
)
from flats import random_gradients
from freestep import Flat, FreestepError, NoGradients
from harness import ThreadService


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGDScheduleFreeClosure", {"lr": 0.3, "weight_decay": 0.5, "momentum": 0.8, "warmup_steps": 5}),
        ("AdamWScheduleFreeClosure", {"lr": 0.3, "weight_decay": 0.5, "warmup_steps": 5, "r": 1.0}),
        ("RAdamScheduleFreeClosure", {"lr": 0.3, "weight_decay": 0.5}),
    ],
)
def test_closure_forms_rest_at_x(home: Home, kind: str, options: dict[str, Any]) -> None:
    """Also beside the form without a closure, ours and the package's."""
    ours, theirs, plain = weights(), weights(), weights()
    optimizer = home(getattr(freestep, kind), ours.values(), **options)
    without = home(getattr(freestep, kind.removesuffix("Closure")), plain.values(), **options)
    other = getattr(schedulefree, kind)(theirs.values(), **options)
    for gradients in random_gradients(20):
        met: list[list[Tensor]] = []

        def closure(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor], met: Any) -> Any:
            def evaluated() -> float:
                assert torch.is_grad_enabled()
                met.append([each.detach().clone() for each in parameters.values()])
                set_gradients(parameters, gradients)
                return 0.25

            return evaluated

        assert optimizer.step(closure(ours, gradients, met)) == 0.25
        assert other.step(closure(theirs, gradients, met)) == 0.25
        set_gradients(plain, gradients)
        y = [each.detach().clone() for each in plain.values()]
        without.step()
        without.eval()
        for mine, others, expected in zip(*met, y, strict=True):
            torch.testing.assert_close(mine, others, **BOUNDS)
            torch.testing.assert_close(mine, expected, **BOUNDS)
        assert_same(ours, theirs)
        assert_same(ours, plain)
        assert_same_z(optimizer, theirs, other)
        assert_same_groups(optimizer, other)
        assert (optimizer.loaded.point, optimizer.param_groups[0]["train_mode"]) == ("x", False)
        without.train()


def test_a_closure_form_needs_a_closure() -> None:
    optimizer = freestep.AdamWScheduleFreeClosure(weights().values(), url="local")
    with pytest.raises(FreestepError, match="needs a closure"):
        optimizer.step(None)  # type: ignore[arg-type]


class Failed(Exception):
    pass


def test_after_an_error_a_closure_form_is_where_it_was(home: Home) -> None:
    ours, twins = weights(), weights()
    optimizer = home(freestep.AdamWScheduleFreeClosure, ours.values(), lr=0.3)
    twin = home(freestep.AdamWScheduleFreeClosure, twins.values(), lr=0.3)

    def failing() -> float:
        raise Failed

    for number, gradients in enumerate(random_gradients(6)):
        before = [each.detach().clone() for each in ours.values()]
        with pytest.raises(Failed):
            optimizer.step(failing)
        with pytest.raises(freestep.NonFiniteGradient):
            optimizer.step(
                lambda: set_gradients(ours, {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()})
            )
        optimizer.zero_grad()
        with pytest.raises(NoGradients):
            optimizer.step(lambda: 0.0)
        # An exchange that fails may leave anything in what it received.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer._run, "exchange", spoiling)
            with pytest.raises(Failed):
                optimizer.step(lambda gradients=gradients: set_gradients(ours, gradients))
        assert all(torch.equal(*each) for each in zip(before, ours.values(), strict=True))
        optimizer.step(lambda gradients=gradients: set_gradients(ours, gradients))
        twin.step(lambda gradients=gradients: set_gradients(twins, gradients))
        assert all(torch.equal(*each) for each in zip(ours.values(), twins.values(), strict=True))
        assert optimizer.param_groups[0]["k"] == number + 1


def spoiling(gradient: Any, claim: Any, into: Flat, *, wait: float) -> Any:
    into.vector.fill_(torch.nan)
    raise Failed


def test_a_closure_form_at_y_when_x_could_not_be_pulled(home: Home) -> None:
    ours = weights()
    optimizer = home(freestep.SGDScheduleFreeClosure, ours.values(), lr=0.3)
    first, second = random_gradients(2)
    pull = optimizer._run.pull_into

    def spoiled(into: Flat, point: str = "x", **options: Any) -> Any:
        if point == "x":
            into.vector.fill_(torch.nan)
            raise Failed
        return pull(into, point, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer._run, "pull_into", spoiled)
        with pytest.raises(Failed):
            optimizer.step(lambda: set_gradients(ours, first))
        with pytest.raises(Failed):
            optimizer.eval()
        y = point(optimizer, "y")
        assert all(torch.equal(*each) for each in zip(ours.values(), y, strict=True))
    optimizer.step(lambda: set_gradients(ours, second))
    x = point(optimizer, "x")
    assert all(torch.equal(*each) for each in zip(ours.values(), x, strict=True))
    assert optimizer.param_groups[0]["k"] == 2


def test_weights_that_are_changed_between_steps_are_warned_about(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    ours = weights()
    optimizer = home(freestep.AdamWScheduleFreeClosure, ours.items(), lr=0.3)
    first, second = random_gradients(2)
    with caplog.at_level(logging.WARNING, "freestep"):
        for _ in range(3):
            optimizer.step(lambda: set_gradients(ours, first))
            optimizer.eval()
            optimizer.train()
        assert not caplog.records
        with torch.no_grad():
            ours["vector"].clamp_(max=0.0)
        for _ in range(2):
            optimizer.step(lambda: set_gradients(ours, second))
    assert ["'vector' was changed" in each.getMessage() for each in caplog.records] == [True]


def test_overwritten_weights_are_x_and_y(home: Home) -> None:
    ours = weights()
    optimizer = home(freestep.SGDScheduleFreeClosure, ours.items(), lr=0.3)
    for gradients in random_gradients(3):
        optimizer.step(lambda gradients=gradients: set_gradients(ours, gradients))
    with torch.no_grad():
        ours["vector"].zero_()
    before = [each.detach().clone() for each in ours.values()]
    optimizer.overwrite()
    for place in ("x", "y", "z"):
        assert all(torch.equal(*each) for each in zip(before, point(optimizer, place), strict=True))
    assert all(torch.equal(*each) for each in zip(before, ours.values(), strict=True))
    assert optimizer.loaded.point == "x"


def test_what_other_workers_do_is_seen_by_a_closure_form(service: ThreadService) -> None:
    ours, others = weights(), weights()
    options: dict[str, Any] = {"lr": 0.3, "url": service.url, "run": "closure-of-two"}
    with (
        freestep.SGDScheduleFreeClosure(ours.items(), **options) as optimizer,
        freestep.SGDScheduleFree(others.items(), **options) as other,
    ):
        for gradients in random_gradients(3):
            set_gradients(others, gradients)
            other.step()
        other.eval()
        optimizer.train()
        assert not torch.equal(ours["matrix"], others["matrix"])
        optimizer.eval()
        assert all(torch.equal(*each) for each in zip(ours.values(), others.values(), strict=True))
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert all(torch.equal(*each) for each in zip(ours.values(), others.values(), strict=True))
        assert optimizer.param_groups[0]["k"] == 3


def test_step_hooks_are_called_once() -> None:
    freestep.AdamWScheduleFree(weights().values(), url="local")
    freestep.RemoteOptimizer(weights().items(), url="local")
    ours = weights()
    optimizer = freestep.AdamWScheduleFreeClosure(ours.values(), url="local")
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    (gradients,) = random_gradients(1)
    optimizer.step(lambda: set_gradients(ours, gradients))
    assert called == ["pre", "post"]


def test_a_closed_closure_form_says_so() -> None:
    optimizer = freestep.RAdamScheduleFreeClosure(weights().values(), url="local")
    optimizer.close()
    for call in (optimizer.eval, optimizer.train, lambda: optimizer.step(lambda: 0.0)):
        with pytest.raises(freestep.Closed):
            call()
