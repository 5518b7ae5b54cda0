"""The drop-in classes beside the `schedulefree` package's: the same points on the same gradients."""

from __future__ import annotations

import inspect
import logging
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
    assert_same_z,
    set_gradients,
    weights,
)
from flats import random_gradients
from freestep import FreestepError, InvalidSpec
from harness import ThreadService
from reference import AdamCPlus

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("SGDScheduleFree", {"lr": 0.3}, {}),
    (
        "SGDScheduleFree",
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.5, "warmup_steps": 5, "r": 1.0, "weight_lr_power": 1},
        {"lr": 0.1, "weight_decay": 0.02},
    ),
    ("AdamWScheduleFree", {"lr": 0.02}, {}),
    (
        "AdamWScheduleFree",
        {
            "lr": 0.05,
            "betas": (0.98, 0.95),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "warmup_steps": 20,
            "r": 0.5,
            "weight_lr_power": 1.0,
        },
        {"lr": 0.01, "weight_decay": 0, "betas": (0.9, 0.999)},
    ),
    ("RAdamScheduleFree", {"lr": 0.02, "weight_decay": 0.1}, {}),
    ("RAdamScheduleFree", {"lr": 0.02, "r": 2.0, "silent_sgd_phase": False}, {"lr": 0.003, "betas": (0.8, 0.99)}),
]


@pytest.mark.parametrize(("kind", "options", "second"), CASES)
def test_x_y_and_z_are_the_packages(home: Home, kind: str, options: dict[str, Any], second: dict[str, Any]) -> None:
    ours, theirs = weights(), weights()

    def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        first, rest = list(parameters.values())[:2], list(parameters.values())[2:]
        return [{"params": first}, {"params": rest, **second}]

    optimizer = home(getattr(freestep, kind), groups(ours), **options)
    other = getattr(schedulefree, kind)(groups(theirs), **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    other.train()
    assert_same_groups(optimizer, other)
    for number, gradients in enumerate(random_gradients(STEPS)):
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        optimizer.step()
        other.step()
        assert_same(ours, theirs)
        assert_same_groups(optimizer, other)
        if number % 9 == 0:
            # Twice, as scripts call them; the second time they change nothing.
            for mode in ("eval", "eval", "train", "train"):
                getattr(optimizer, mode)()
                getattr(other, mode)()
                assert_same(ours, theirs)
                assert_same_groups(optimizer, other)
            assert_same_z(optimizer, theirs, other)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 20.0, "sf_beta1": 0.8, "sf_beta1_anneal_steps": 10, "c_warmup": 5, "r": 1.0, "lr": 0.5}],
)
def test_schedule_free_plus_is_the_papers(home: Home, options: dict[str, Any]) -> None:
    ours = weights()
    optimizer = home(freestep.AdamCScheduleFreePlus, ours.items(), **options)
    twin = AdamCPlus({name: each.detach().clone() for name, each in ours.items()}, **options)
    for number, gradients in enumerate(random_gradients(20)):
        gradients = {name: gradients[name] for name in SHAPES}
        set_gradients(ours, gradients)
        assert optimizer.step_func(1.0 + number % 3) == 1.0 + number % 3
        twin.step(gradients, 1.0 + number % 3)
        for name, tensor in twin.y.items():
            torch.testing.assert_close(ours[name].detach(), tensor.float(), rtol=1e-4, atol=1e-5)
    (group,) = optimizer.param_groups
    assert (group["k"], group["lr_max"], group["weight_sum"]) == (20, None, None)
    with pytest.raises(InvalidSpec, match=r"[lL]oss"):
        optimizer.step()


def test_foreach_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Beside a parameter that gets no gradient, and a group without parameters."""
    found = []
    for foreach in (True, False, None):
        ours = weights()
        *first, last = ours.values()
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "freestep"):
            optimizer = freestep.AdamWScheduleFree(
                [{"params": first}, {"params": [last]}, {"params": []}], lr=0.3, foreach=foreach, url="local"
            )
        assert any("foreach" in each.getMessage() for each in caplog.records) == (foreach is not None)
        for gradients in random_gradients(5):
            set_gradients(ours, gradients)
            last.grad = None
            optimizer.step()
        optimizer.eval()
        found.append([each.detach().clone() for each in ours.values()])
        assert [group["k"] for group in optimizer.param_groups] == [5, 5, 5]
    assert all(torch.equal(*each) for each in zip(found[0], found[1], strict=True))
    assert all(torch.equal(*each) for each in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "SGDScheduleFree",
        "AdamWScheduleFree",
        "RAdamScheduleFree",
        "ScheduleFreeWrapper",
        "SGDScheduleFreeClosure",
        "AdamWScheduleFreeClosure",
        "RAdamScheduleFreeClosure",
    ],
)
def test_the_arguments_are_the_packages(name: str) -> None:
    theirs = inspect.signature(getattr(schedulefree, name)).parameters
    ours = inspect.signature(getattr(freestep, name)).parameters
    assert [each for each in ours if each not in ("run", "url", "options")] == list(theirs)
    for each in theirs.values():
        if each.name != "foreach":
            assert ours[each.name].default == each.default


def test_counters_of_a_run_that_is_joined_late(service: ThreadService) -> None:
    """They are those of the run's steps, whoever took them."""
    for name, options in (
        ("SGDScheduleFree", {"warmup_steps": 7}),
        ("AdamWScheduleFree", {"r": 1.0}),
        ("RAdamScheduleFree", {}),
    ):
        kind = getattr(freestep, name)
        ours = weights()
        first = kind(ours.items(), url=service.url, run=f"late-{name}", **options)
        other = getattr(schedulefree, name)(weights().values(), **options)
        other.train()
        theirs = {key: each for key, each in zip(SHAPES, other.param_groups[0]["params"], strict=True)}
        for gradients in random_gradients(12):
            set_gradients(ours, gradients)
            set_gradients(theirs, gradients)
            first.step()
            other.step()
        with first, kind(weights().items(), url=service.url, run=f"late-{name}", **options) as second:
            assert_same_groups(second, other)


@pytest.mark.parametrize("kind", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "AdamCScheduleFreePlus"])
def test_who_names_no_hyperparameters_takes_the_runs(
    service: ThreadService, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A default counts as none."""
    make = getattr(freestep, kind)
    options: dict[str, Any] = {"url": service.url, "run": name}
    with make(weights().items(), 0.125, max_grad_norm=3.0, **options):
        with caplog.at_level(logging.WARNING, "freestep"), make(weights().items(), **options) as second:
            assert second.param_groups[0]["lr"] == 0.125
        assert not caplog.records
        with caplog.at_level(logging.WARNING, "freestep"), make(weights().items(), 0.25, **options) as third:
            assert third.param_groups[0]["lr"] == 0.125
        assert ["lr" in each.getMessage() for each in caplog.records] == [True]


def test_counters_of_a_run_with_another_spec(service: ThreadService) -> None:
    ours = weights()
    with freestep.RemoteOptimizer(ours.items(), url=service.url, run="another-spec", algorithm="sgd", lr=0.1):
        with freestep.SGDScheduleFree(weights().items(), url=service.url, run="another-spec") as optimizer:
            (group,) = optimizer.param_groups
            assert (group["k"], group["lr_max"], group["weight_sum"]) == (0, None, None)


def test_the_protocol_of_optimizers(home: Home) -> None:
    model = nn.Linear(3, 2)
    optimizer = home(freestep.AdamWScheduleFree, model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(FreestepError, match="fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    assert state["param_groups"][0]["k"] == 1
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["lr"]) == (1, 0.1)


def test_a_loss_that_is_not_finite_is_named_where_steps_are_taken_by_it(home: Home) -> None:
    model = nn.Linear(2, 1)
    optimizer = home(freestep.AdamCScheduleFreePlus, model.named_parameters(), lr=1.0)
    for loss in (torch.tensor(torch.nan), float("inf")):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(freestep.NonFiniteGradient, match=r"the loss is (nan|inf)"):
            optimizer.step(loss=loss)
    optimizer.step(loss=1.0)
    assert optimizer.receipt is not None and optimizer.receipt.decision == "applied"
