"""A saved worker resumes: where its run lives, at its newest y; where it is gone or behind, as it was told to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from freestep import (
    AdamWScheduleFree,
    LocalSteps,
    ManifestMismatch,
    RemoteOptimizer,
    Run,
    RunSpec,
    RunStatus,
    StateMismatch,
)
from freestep.resume import OnMissing, way_to_resume
from freestep.saved_state import SavedPlace
from harness import ThreadService
from trained import held, network, pulled, step

Make = Callable[..., RemoteOptimizer]
Saved = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture
def make(make: Make) -> Make:
    """Makes optimizers of one run; they are closed with the test."""
    return partial(make, aggregation="async")


@pytest.fixture
def saved(make: Make) -> Saved:
    """The states of a model and of its optimizer, which has taken three steps and is closed."""
    model = network(0)
    optimizer = make(model)
    for number in range(3):
        step(model, optimizer, number)
    states = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    optimizer.close()
    return states


def resumed(make: Make, states: Saved, **options: Any) -> tuple[nn.Module, RemoteOptimizer]:
    """As scripts do: a new model, its optimizer, then the states of both."""
    model = network(1)
    optimizer = make(model, **options)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    return model, optimizer


def test_where_the_run_lives_its_newest_y_is_loaded_and_said(
    make: Make, saved: Saved, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    other = network(2)
    with make(other, worker="other") as optimizer:
        step(other, optimizer, 7)
    with caplog.at_level(logging.WARNING, "freestep"):
        model, optimizer = resumed(make, saved)
    (record,) = caplog.records
    assert "goes on at step 4" in record.getMessage()
    assert "saved at step 3" in record.getMessage()
    assert torch.equal(held(model), pulled(run))
    step(model, optimizer, 8)
    assert "was changed outside" not in caplog.text
    assert run.status().step == 5


def test_a_state_of_this_moment_costs_no_request(make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, push_dtype="BF16")
    for number in range(2):
        step(model, optimizer, number)
    before = run.workers()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    after = run.workers()
    assert [each.lease for each in before] == [each.lease for each in after]
    assert all(
        torch.equal(one["residual"], other["residual"])
        for one, other in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
    )
    step(model, optimizer, 2)
    assert run.status().step == 3


def delete(run: Run) -> None:
    run.delete()


def go_back(run: Run) -> None:
    run.restore(0)


@pytest.mark.parametrize("lose", [delete, go_back])
def test_where_the_run_is_gone_or_behind_both_choices_are_named(
    make: Make, run: Run, lose: Callable[[Run], None]
) -> None:
    model = network(0)
    optimizer = make(model)
    run.checkpoint()
    step(model, optimizer, 0)
    states = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    optimizer.close()
    lose(run)
    with pytest.raises(StateMismatch, match=r'on_missing="seed".*on_missing="join"') as caught:
        resumed(make, states)
    assert "step 1" in str(caught.value)
    assert run.status().step == 0
    # As the message says.
    model, optimizer = resumed(make, states, on_missing="seed")
    assert torch.equal(held(model), torch.cat([each.reshape(-1) for each in states[0].values()]))
    assert all(torch.equal(held(model), pulled(run, point)) for point in ("x", "y", "z"))
    step(model, optimizer, 1)
    assert optimizer.receipt is not None
    assert optimizer.receipt.decision == "applied"


def test_a_run_that_others_have_begun_anew_is_joined(
    make: Make, saved: Saved, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.delete()
    first, optimizer = resumed(make, saved, on_missing="seed")
    step(first, optimizer, 0)
    with caplog.at_level(logging.WARNING, "freestep"):
        second, other = resumed(make, saved, on_missing="seed")
    assert torch.equal(held(second), held(first))
    assert "goes on at step 1" in caplog.text
    step(second, other, 1)
    assert run.status().step == 2


def test_a_run_that_is_gone_is_joined_as_it_is(make: Make, saved: Saved, run: Run) -> None:
    run.delete()
    model, optimizer = resumed(make, saved, on_missing="join")
    assert torch.equal(held(model), held(network(1)))
    step(model, optimizer, 0)
    assert run.status().step == 1


def test_a_residual_of_lost_pushes_is_not_restored(make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, push_dtype="BF16")
    run.checkpoint()
    for number in range(2):
        step(model, optimizer, number)
    states = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    optimizer.close()
    run.restore(0)
    _, again = resumed(make, states, on_missing="join", push_dtype="BF16")
    assert not any(each["residual"].any() for each in again.state_dict()["state"].values())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state["param_groups"][0].update(run="another"), "'another'"),
        (lambda state: state["param_groups"][0].pop("epoch"), "names no run"),
        (lambda state: state["param_groups"].clear(), "names no run"),
        (lambda state: state["param_groups"][0]["params"].pop(), "param groups of"),
    ],
)
def test_a_state_that_is_not_of_this_optimizer_changes_nothing(
    make: Make, saved: Saved, run: Run, spoil: Callable[[Any], Any], said: str
) -> None:
    model = network(1)
    optimizer = make(model, worker="me")
    before, name = held(model), optimizer.worker
    state = copy.deepcopy(saved[1])
    spoil(state)
    with pytest.raises(ManifestMismatch, match=said):
        optimizer.load_state_dict(state)
    assert torch.equal(held(model), before)
    assert optimizer.worker == name
    step(model, optimizer, 0)
    assert run.status().step == 4


def test_a_wrong_choice_is_refused_at_once(make: Make) -> None:
    with pytest.raises(Exception, match="'raise', 'seed' or 'join'"):
        make(network(), on_missing="ignore")


def test_the_step_is_shown_to_whoever_asks(make: Make) -> None:
    model = network()
    optimizer = make(model)
    step(model, optimizer, 0)
    (group,) = optimizer.param_groups
    assert (group["step"], group["point"], group["train_mode"]) == (1, "y", True)
    optimizer.eval()
    assert (optimizer.loaded.point, group["point"], group["train_mode"]) == ("x", "x", False)
    optimizer.train()
    assert (optimizer.loaded.point, group["train_mode"]) == ("y", True)


SAVED = SavedPlace("run", "a1", "worker", "y", 3, 120)


@pytest.mark.parametrize(
    ("run_id", "step", "on_missing", "way"),
    [
        ("a1", 120, "raise", "join"),
        ("a1", 500, "seed", "join"),
        # Of an older version, which tells no id.
        (None, 120, "raise", "join"),
        ("a1", 119, "raise", None),
        ("a1", 119, "seed", "seed"),
        ("a1", 119, "join", "join"),
        ("b2", 0, "raise", None),
        ("b2", 500, "raise", None),
        ("b2", 0, "seed", "seed"),
        ("b2", 1, "seed", "join"),
        ("b2", 0, "join", "join"),
    ],
)
def test_the_way_on_from_a_saved_state(run_id: str | None, step: int, on_missing: OnMissing, way: str | None) -> None:
    spec = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [1]}]}
    status = RunStatus(run="run", id=run_id, epoch=5, step=step, initialized=True,
                       spec=RunSpec.model_validate(spec), workers=[], pushes={}, parameter_count=1)  # fmt: skip
    if way is None:
        with pytest.raises(StateMismatch, match=f"at step {step}"):
            way_to_resume(SAVED, status, on_missing)
    else:
        assert way_to_resume(SAVED, status, on_missing) == way


def test_a_residual_is_found_by_the_names_of_parameters(service: ThreadService, name: str) -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    options = {"url": service.url, "run": name, "algorithm": "sgd", "push_encoding": "topk", "topk_fraction": 0.2}

    def residuals(optimizer: RemoteOptimizer) -> dict[str, torch.Tensor]:
        state = optimizer.state_dict()
        names = [name for group in state["param_groups"] for name in group["param_names"]]
        return dict(zip(names, (each["residual"] for each in state["state"].values()), strict=True))

    with RemoteOptimizer(layers, **options) as optimizer:
        layers(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
        optimizer.step()
        saved, state = residuals(optimizer), optimizer.state_dict()
    with RemoteOptimizer(list(reversed(list(layers.named_parameters()))), **options) as other:
        other.load_state_dict(state)
        found = residuals(other)
    assert saved["0.weight"].any()
    assert list(found) != list(saved)
    assert all(torch.equal(found[name], residual) for name, residual in saved.items())


def test_a_state_of_local_steps_is_refused(make: Make, service: ThreadService, name: str) -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with LocalSteps(model, inner, every=2, url=service.url, run=name, aggregation="async") as local:
        state = local.state_dict()
    with pytest.raises(ManifestMismatch, match="of LocalSteps"):
        make(network()).load_state_dict(state)


def test_a_drop_in_class_keeps_x_where_it_was_saved_at_x(service: ThreadService, name: str) -> None:
    model, again = network(0), network(1)
    with AdamWScheduleFree(model, url=service.url, run=name) as optimizer:
        step(model, optimizer, 0)
        step(model, optimizer, 1)
        optimizer.eval()
        state = optimizer.state_dict()
    with AdamWScheduleFree(again, url=service.url, run=name) as optimizer:
        optimizer.load_state_dict(state)
        assert torch.equal(held(again), held(model))
        assert optimizer.param_groups[0]["train_mode"] is False
