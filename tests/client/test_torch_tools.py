"""What PyTorch has beside optimizers: compiled models and steps, averages of weights, closures that are taken again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from freestep import FreestepError, InvalidSpec, LocalSteps, RemoteOptimizer, Run, ScheduleFreeWrapper
from harness import ThreadService
from trained import TOLERANCE, held, loss_of, network, step

Make = Callable[..., RemoteOptimizer]
MakeLocal = Callable[..., LocalSteps]


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_a_compiled_model_trains_as_one_that_is_not(remotely: Make, run: Run, when: str) -> None:
    model: Any = network()
    used: Any = model if when == "in place" else torch.compile(model, backend="aot_eager")
    optimizer = remotely(used if when == "before" else model, lr=0.1)
    if when == "in place":
        model.compile(backend="aot_eager")
    twin = network()
    peer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for number in range(4):
        step(used, optimizer, number)
        step(twin, peer, number)
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert [each.name for each in run.status().spec.parameters] == [name for name, _ in twin.named_parameters()]
    optimizer.eval()
    with torch.no_grad():
        assert loss_of(used, 9) == pytest.approx(loss_of(model, 9))


# torch.compile's own, where it traces backward().
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("compiled", ["the step", "a whole step of training"])
def test_a_compiled_step_pushes(remotely: Make, run: Run, compiled: str) -> None:
    model, twin = network(), network()
    optimizer, peer = remotely(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    take = torch.compile(optimizer.step, backend="eager") if compiled == "the step" else optimizer.step

    def train(number: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        take(loss=loss.detach(), samples=8)

    if compiled != "the step":
        train = torch.compile(train, backend="eager")
    for number in range(4):
        train(number)
        step(twin, peer, number)
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert run.status().step == 4


def test_rounds_are_taken_by_compiled_steps(locally: MakeLocal, run: Run) -> None:
    model, twin = network(), network()
    options = {"every": 2, "algorithm": "sgd", "lr": 1.0}
    optimizer = locally(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    peer = torch.optim.SGD(twin.parameters(), lr=0.1)
    take = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        take()
        step(twin, peer, number)
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert run.status().step == 2


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["mean", "EMA"])
def test_averages_of_weights_are_kept_beside(
    remotely: Make, average: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = network(), network()
    optimizer, peer = remotely(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    one, other = AveragedModel(model, **average), AveragedModel(twin, **average)
    for number in range(4):
        step(model, optimizer, number)
        step(twin, peer, number)
        one.update_parameters(model)
        other.update_parameters(twin)
    torch.testing.assert_close(held(one.module), held(other.module), **TOLERANCE)
    # A copy of the model is no part of the run.
    assert not torch.equal(held(one.module), held(model))
    assert torch.equal(held(copy.deepcopy(model)), held(model))
    assert caplog.records == []


def test_a_schedule_of_averages_has_no_effect_and_says_so(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = remotely(model, lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.5, anneal_epochs=1)
    with caplog.at_level(logging.WARNING, "freestep"):
        for number in range(3):
            step(model, optimizer, number)
            schedule.step()
    (record,) = caplog.records
    assert "has no effect" in record.getMessage()
    assert optimizer.param_groups[0]["scheduled_lr"] == pytest.approx(0.1)


def test_a_closure_is_evaluated_once_for_each_push(remotely: Make, run: Run) -> None:
    model = network()
    optimizer = remotely(model, lr=0.1)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, len(calls))
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    for number in range(3):
        assert optimizer.step(closure) == calls[number]
    assert (len(calls), run.status().step) == (3, 3)


def test_optimizers_that_take_closures_again_are_no_bases(service: ThreadService) -> None:
    with pytest.raises(InvalidSpec, match=r"base\.algorithm: must be one of sgd, "):
        RemoteOptimizer(
            network(), url=service.url, run="none", algorithm="schedule_free_wrapper", base={"algorithm": "lbfgs"}
        )
    with pytest.raises(FreestepError, match=r"a run can have one of torch\.optim's SGD, "):
        ScheduleFreeWrapper(torch.optim.LBFGS(network().parameters()), url=service.url, run="none")


def test_they_may_take_a_workers_own_steps(locally: MakeLocal, run: Run) -> None:
    model, twin = network(), network()
    inner = torch.optim.LBFGS(model.parameters(), max_iter=4)
    optimizer = locally(model, inner, every=2, algorithm="sgd", lr=1.0)
    peer = torch.optim.LBFGS(twin.parameters(), max_iter=4)
    calls = []

    def closure(its: nn.Module) -> Callable[[], float]:
        def evaluate() -> float:
            its.zero_grad()
            loss = loss_of(its, 0)
            loss.backward()
            calls.append(its)
            return loss.item()

        return evaluate

    for _ in range(2):
        optimizer.step(closure(model))
        peer.step(closure(twin))  # type: ignore[arg-type]
    assert calls.count(model) == calls.count(twin) > 4
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert run.status().step == 1
