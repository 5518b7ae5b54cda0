"""Weights that are to be evaluated and saved as they are stay in the model until training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from freestep import Closed, EvalMode, FreestepError, LocalSteps, RemoteOptimizer, Run
from freestep.closure_forms import SGDScheduleFreeClosure
from harness import ThreadService
from trained import WHOLE, Counting, held, hold, loss_of, network, pulled, step

Make = Callable[..., RemoteOptimizer]
MakeLocal = Callable[..., LocalSteps]


def test_an_x_stays_while_others_go_on(remotely: Make, run: Run) -> None:
    model, other = network(), network()
    optimizer = remotely(model, algorithm="sgd_schedule_free")
    step(model, optimizer, 0)
    optimizer.eval()
    optimizer.keep_weights()
    before = held(model)
    step(other, remotely(other, algorithm="sgd_schedule_free", worker="other"), 1)
    optimizer.eval()
    assert torch.equal(held(model), before)
    assert not torch.equal(pulled(run, "x"), before)
    optimizer.train()
    assert torch.equal(held(model), pulled(run))
    optimizer.eval()
    assert torch.equal(held(model), pulled(run, "x"))


@pytest.mark.parametrize("point", ["y", "x"])
def test_weights_from_elsewhere_stay_and_are_no_place_to_take_gradients(
    remotely: Make, run: Run, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = remotely(model)
    step(model, optimizer, 0)
    if point == "x":
        optimizer.eval()
    best = torch.arange(float(held(model).numel()))
    hold(model, best)
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer.keep_weights()
        optimizer.eval()
        assert torch.equal(held(model), best)
        with pytest.raises(EvalMode, match=r"were kept: call train\(\) before step\(\)"):
            step(model, optimizer, 1)
        assert run.status().step == 1
        optimizer.train()
        assert torch.equal(held(model), pulled(run))
        step(model, optimizer, 1)
    assert run.status().step == 2
    # What was computed at kept weights after x is told of; else there is nothing to say.
    assert [each.getMessage() for each in caplog.records if "at x are discarded" not in each.getMessage()] == []


def test_a_restored_state_loads_y(remotely: Make, run: Run) -> None:
    model = network()
    optimizer = remotely(model)
    step(model, optimizer, 0)
    hold(model, torch.zeros_like(held(model)))
    optimizer.keep_weights()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(held(model), pulled(run))
    step(model, optimizer, 1)
    assert run.status().step == 2


def test_not_while_a_push_is_in_flight(remotely: Make) -> None:
    model = network()
    optimizer = remotely(model)
    step(model, optimizer, 0, overlap=True)
    with pytest.raises(FreestepError, match=r"call flush\(\)"):
        optimizer.keep_weights()
    optimizer.flush()
    optimizer.keep_weights()


def test_not_after_the_end(remotely: Make) -> None:
    optimizer = remotely(network())
    optimizer.close()
    with pytest.raises(Closed):
        optimizer.keep_weights()


def test_an_optimizer_that_rests_at_x_keeps_them_too(service: ThreadService, run: Run) -> None:
    model = network()
    with SGDScheduleFreeClosure(model, url=service.url, run=run.name, lr=0.1) as optimizer:

        def closure() -> float:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        best = torch.arange(float(held(model).numel()))
        hold(model, best)
        optimizer.keep_weights()
        optimizer.eval()
        assert torch.equal(held(model), best)
        optimizer.train()
        assert torch.equal(held(model), pulled(run, "x"))
        optimizer.step(closure)
    assert run.status().step == 2


def test_a_round_that_was_interrupted_goes_on(locally: MakeLocal) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd)
    model.step(optimizer, 3)
    optimizer.eval()
    optimizer.keep_weights()
    hold(model, torch.full((30,), 50.0))
    optimizer.eval()
    assert model.counted == 50
    with pytest.raises(EvalMode, match="kept"):
        model.step(optimizer)
    optimizer.train()
    assert (model.counted, optimizer.steps) == (3, 3)


def test_a_round_whose_parameters_were_replaced_is_lost(locally: MakeLocal) -> None:
    model = Counting()
    optimizer = locally(model, model.sgd, **WHOLE)
    model.step(optimizer, 3)
    hold(model, torch.full((30,), 50.0))
    optimizer.keep_weights()
    with pytest.raises(EvalMode, match=r"before push\(\)"):
        optimizer.push()
    optimizer.train()
    assert (model.counted, optimizer.steps) == (0, 0)
    model.step(optimizer, 5)
    assert model.counted == 5
