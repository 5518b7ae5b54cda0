"""Weights that were changed by hand are noticed, and those that were not raise no alarm."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from freestep import Flat, RemoteOptimizer, Run
from freestep.api.models import ParameterSpec
from freestep.weights_guard import WeightsGuard
from freestep.wire.manifest import Manifest
from trained import held, hold, network, pulled, step

Make = Callable[..., RemoteOptimizer]


def guarded(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[WeightsGuard, dict[str, nn.Parameter]]:
    names = [f"p{number}" for number in range(len(shapes))]
    received = Flat(Manifest(ParameterSpec(name=name, shape=shape) for name, shape in zip(names, shapes, strict=True)))
    received.vector.normal_(generator=torch.Generator().manual_seed(0))
    tensors = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in zip(names, shapes, strict=True)}
    received.scatter(tensors)
    guard = WeightsGuard(tensors, received)
    guard.note_loaded()
    return guard, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_loaded_is_no_change(dtype: torch.dtype) -> None:
    guard, tensors = guarded((3, 4), (), (0, 2), (9000,), dtype=dtype)
    for _ in range(20):
        assert guard.changed() is None
    with torch.no_grad():
        for tensor in tensors.values():
            # The same values written again, as DistributedDataParallel does when it is made.
            tensor.copy_(tensor.clone())
    assert guard.changed() is None


def test_one_changed_element_is_found_at_once() -> None:
    guard, tensors = guarded((3, 4), (9000,))
    with torch.no_grad():
        tensors["p1"][8999] += 1
    assert guard.changed() == "p1"


def test_a_change_through_data_is_found_within_a_round() -> None:
    guard, tensors = guarded((3, 4), (), (9000,))
    tensors["p2"].data[8999] += 1
    assert "p2" in [guard.changed() for _ in range(2)]
    guard, tensors = guarded(*[(5,)] * 20, (100_000,), (7,))
    tensors["p20"].data[99_999] += 1
    assert "p20" in [guard.changed() for _ in range(20)]


def test_nothing_is_compared_with_what_an_interrupted_exchange_has_left() -> None:
    guard, tensors = guarded((3, 4))
    guard.suspend()
    tensors["p0"].data += 1
    assert guard.changed() is None
    guard.note_loaded()
    assert guard.changed() == "p0"


@pytest.mark.parametrize("shape", [(4, 3), (3, 1, 4)])
def test_a_parameter_that_lies_otherwise_in_memory_is_compared_too(shape: tuple[int, ...]) -> None:
    guard, tensors = guarded(shape)
    tensors["p0"].data = tensors["p0"].detach().clone().mT.contiguous().mT
    assert guard.changed() is None
    tensors["p0"].data[-1] += 1
    assert guard.changed() == "p0"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "was changed outside" in each.getMessage()]


def test_weights_that_are_written_by_hand_are_warned_about_once(
    remotely: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = network(0)
    optimizer = remotely(model)
    with caplog.at_level(logging.WARNING, "freestep"):
        step(model, optimizer, 0)
        optimizer.eval()
        optimizer.train()
        step(model, optimizer, 1, overlap=True)
        step(model, optimizer, 2, overlap=True)
        optimizer.flush()
        assert warnings(caplog) == []
        for number in range(3):
            model.load_state_dict(network(1).state_dict())
            step(model, optimizer, number)
    (text,) = warnings(caplog)
    assert "'0.weight'" in text
    assert "overwrite()" in text


def test_clamped_weights_are_noticed(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = network(0)
    optimizer = remotely(model)
    with caplog.at_level(logging.WARNING, "freestep"):
        for number in range(5):
            step(model, optimizer, number)
            for parameter in model.parameters():
                parameter.data.clamp_(-0.01, 0.01)
    assert len(warnings(caplog)) == 1


def test_overwriting_makes_them_the_runs(remotely: Make, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    models = [network(0), network(1)]
    first, second = (remotely(model, worker=f"w{number}", algorithm="adamw_schedule_free", lr=0.01)
                     for number, model in enumerate(models))  # fmt: skip
    for number in range(3):
        step(models[0], first, number)
    wanted = torch.linspace(-1, 1, held(models[0]).numel())
    with caplog.at_level(logging.WARNING, "freestep"):
        hold(models[0], wanted)
        first.overwrite()
        assert warnings(caplog) == []
    assert torch.equal(held(models[0]), wanted)
    assert all(torch.equal(pulled(run, point), wanted) for point in ("x", "y", "z"))
    assert run.status().step == 3
    step(models[0], first, 4)
    assert first.receipt is not None
    assert first.receipt.decision == "applied"
    # The other worker's gradient was taken at weights that are gone.
    step(models[1], second, 5)
    assert second.receipt is not None
    assert second.receipt.reason == "epoch-changed"
    assert torch.equal(held(models[1]), pulled(run))


def test_train_and_eval_fetch_what_is_newest(remotely: Make, run: Run) -> None:
    models = [network(0), network(1)]
    onlooker, worker = (remotely(model, worker=f"w{number}") for number, model in enumerate(models))
    onlooker.eval()
    step(models[1], worker, 0)
    onlooker.eval()
    assert (onlooker.loaded.point, onlooker.loaded.step) == ("x", 1)
    assert torch.equal(held(models[0]), pulled(run, "x"))
    onlooker.train()
    step(models[1], worker, 1)
    onlooker.train()
    assert (onlooker.loaded.point, onlooker.loaded.step) == ("y", 2)
    # Gradients that were taken at this y are pushed as of it.
    for parameter in models[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(models[1], worker, 2)
    onlooker.train()
    assert onlooker.loaded.step == 2
    onlooker.step()
    assert onlooker.receipt is not None
    assert onlooker.receipt.staleness == 1
