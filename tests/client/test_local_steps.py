"""LocalSteps against plain loops of the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freestep import Flat, LocalSteps, ManifestMismatch, Run
from meanwhile import at_once
from trained import ADAMW, TOLERANCE, WHOLE, Counting, held, hold, loss_of, network, pulled, saved_residual, step


@pytest.mark.parametrize(("every", "shards"), [(1, 1), (1, 3), (4, 1)])
def test_a_whole_outer_step_leaves_the_inner_optimizer_alone(
    locally: Callable[..., LocalSteps], every: int, shards: int
) -> None:
    model, twin = network(), network()
    peer = torch.optim.AdamW(twin.parameters(), **ADAMW)
    optimizer = locally(model, every=every, shards=shards, **WHOLE)
    for number in range(20):
        step(model, optimizer, number)
        step(twin, peer, number)
        torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert optimizer.loaded.step == 20 // every


def plain_diloco(models: list[nn.Module], rounds: int, every: int, weights: list[float]) -> Tensor:
    """DiLoCo, arXiv 2311.08105, algorithm 1, with the mean weighted; the outer parameters at its end."""
    outer = nn.Parameter(held(models[0]))
    nesterov = torch.optim.SGD([outer], lr=0.7, momentum=0.9, nesterov=True)
    inner = [torch.optim.AdamW(model.parameters(), **ADAMW) for model in models]
    for number in range(rounds):
        outer.grad = torch.zeros_like(outer)
        for worker, (model, its) in enumerate(zip(models, inner, strict=True)):
            hold(model, outer.detach())
            for local in range(every):
                step(model, its, 1000 * worker + number * every + local)
            outer.grad += weights[worker] / sum(weights) * (outer.detach() - held(model))
        nesterov.step()
    return outer.detach()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("samples", [None, (8.0, 24.0)])
def test_two_workers_are_diloco(
    locally: Callable[..., LocalSteps], shards: int, samples: tuple[float, float] | None
) -> None:
    models = [network(), network()]
    optimizers = [
        locally(model, aggregation="sync", worker=f"w{number}", shards=shards) for number, model in enumerate(models)
    ]

    def work(worker: int) -> None:
        for number in range(30):
            own = None if samples is None else samples[worker]
            step(models[worker], optimizers[worker], 1000 * worker + number, samples=own)

    at_once(*(partial(work, worker) for worker in range(2)))
    expected = plain_diloco([network(), network()], 6, 5, list(samples or (1.0, 1.0)))
    for model, optimizer in zip(models, optimizers, strict=True):
        assert optimizer.loaded.step == 6
        torch.testing.assert_close(held(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"push_dtype": "BF16"}, {"push_encoding": "int8"}, {"push_encoding": "topk", "topk_fraction": 0.3}]
)
def test_what_an_encoding_leaves_out_is_pushed_later(
    locally: Callable[..., LocalSteps], run: Run, options: dict[str, Any]
) -> None:
    model = network()
    optimizer = locally(model, **WHOLE, **options)
    after: list[Tensor] = []
    optimizer.inner.register_step_post_hook(lambda *_: after.append(held(model)))
    begun = held(model)
    progress = torch.zeros_like(begun)
    for number in range(40):
        before = held(model)
        step(model, optimizer, number)
        progress += after[-1] - before
    residual = saved_residual(optimizer)
    assert residual.abs().sum() > 0
    torch.testing.assert_close(begun + progress, pulled(run) - residual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_narrow_model_pushes_nothing_of_what_its_rounding_takes(
    locally: Callable[..., LocalSteps], run: Run, dtype: str
) -> None:
    model = Counting()
    with torch.no_grad():
        model.count.fill_(1.001)
    model.bfloat16()
    optimizer = locally(model, model.sgd, every=1, push_dtype=dtype, overlap=True, **WHOLE)
    # Another worker leaves y where a narrow model cannot have it.
    y = pulled(run)
    with run.lease("other") as lease:
        run.push({"count": torch.full((30,), 2.0**-12)}, lease.claim(0))
    for _ in range(5):
        model.step(optimizer, value=0.0)
    optimizer.flush()
    assert torch.equal(pulled(run), y - 2.0**-12)


def test_schedulers_of_the_inner_optimizer_work(locally: Callable[..., LocalSteps]) -> None:
    model, twin = network(), network()
    peer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer = locally(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **WHOLE)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=20) for each in (optimizer.inner, peer)]
    for number in range(20):
        step(model, optimizer, number)
        step(twin, peer, number)
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)


def test_a_step_that_overflowed_is_none_of_the_round(locally: Callable[..., LocalSteps]) -> None:
    model, twin = network(), network()
    peer = torch.optim.AdamW(twin.parameters(), **ADAMW)
    optimizer = locally(model, every=3, **WHOLE)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(7):
        optimizer.zero_grad()
        for part in range(2):
            loss = loss_of(model, 2 * number + part) * (float("inf") if number == 2 else 0.5)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 2:
            peer.zero_grad()
            for part in range(2):
                (0.5 * loss_of(twin, 2 * number + part)).backward()
            peer.step()
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert (optimizer.loaded.step, optimizer.steps) == (2, 0)


def test_a_closure_is_evaluated_and_losses_are_averaged(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = network()
    optimizer = locally(model, every=2)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, len(losses))
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    for _ in range(2):
        assert optimizer.step(closure) == losses[-1]
    assert run.status().loss == pytest.approx(sum(losses) / 2)


def test_losses_that_were_set_are_averaged(locally: Callable[..., LocalSteps], run: Run) -> None:
    model = network()
    optimizer = locally(model, every=2)
    for number in range(2):
        optimizer.loss = 1.0 + number
        step(model, optimizer, number)
    assert run.status().loss == 1.5


def test_frozen_parameters_stay_out_and_tied_ones_are_one(locally: Callable[..., LocalSteps]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    optimizer = locally(model, every=2)
    assert [each.name for each in optimizer.spec.parameters] == ["0.weight", "0.bias", "1.bias", "2.bias"]
    for number in range(4):
        step(model, optimizer, number)
    assert torch.equal(model[2].weight, frozen)
    assert model[1].weight is model[0].weight
    model[0].bias.requires_grad_(False)
    before = held(model)
    with pytest.raises(ManifestMismatch, match=r"'0\.bias' no longer requires"):
        step(model, optimizer, 5)
    assert torch.equal(held(model), before)


def test_a_worker_holds_three_vectors(locally: Callable[..., LocalSteps]) -> None:
    optimizer = locally(network())
    kept = [*vars(optimizer).values(), *vars(optimizer._gradients).values(), *vars(optimizer._round).values()]
    assert sum(isinstance(value, Flat) for value in kept) == 3


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_slower_workers_take_fewer_steps(locally: Callable[..., LocalSteps], run: Run) -> None:
    seconds = {"fast": 0.5, "half": 1.0, "third": 1.5, "snail": 64.0}
    clocks = {name: Clock() for name in seconds}
    models = {name: Counting() for name in seconds}
    optimizers = {
        name: locally(model, model.sgd, every=12, dynamic=True, worker=name, clock=clocks[name], **WHOLE)
        for name, model in models.items()
    }

    def play_a_round(name: str) -> int:
        optimizer = optimizers[name]
        for taken in range(1, 100):
            clocks[name].now += seconds[name]
            models[name].step(optimizer)
            if optimizer.steps == 2:
                # What an evaluation takes is no part of a step.
                optimizer.eval()
                clocks[name].now += 3600.0
                optimizer.train()
            if optimizer.steps == 0:
                return taken
        raise AssertionError("the round does not end")

    # A round's length is decided at the end of the one before, by what is known of others then.
    for name in ("snail", "third", "half", "fast"):
        assert [play_a_round(name) for _ in range(2)] == [12, 12]
    assert {worker.worker: worker.speed for worker in run.workers()} == {
        name: pytest.approx(1 / each) for name, each in seconds.items()
    }
    for _ in range(2):
        lengths = {name: play_a_round(name) for name in seconds}
    assert lengths == {"fast": 12, "half": 6, "third": 4, "snail": 1}
    optimizers["fast"].close()
    for _ in range(2):
        lengths = {name: play_a_round(name) for name in ("half", "third", "snail")}
    assert lengths == {"half": 12, "third": 8, "snail": 1}


@pytest.mark.parametrize("at_x", [False, True])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_resumed_round_is_as_fast_as_its_steps_were(
    locally: Callable[..., LocalSteps], run: Run, is_told: bool, at_x: bool
) -> None:
    """Else others would take it for many times as fast as they are, and shorten their rounds. is_told: whether the
    state says how long its steps have taken, as those of older versions do not."""
    clock, model = Clock(), Counting()
    optimizer = locally(model, model.sgd, every=4, dynamic=True, worker="w", clock=clock, **WHOLE)
    for _ in range(3):
        clock.now += 2.0
        model.step(optimizer)
    if at_x:
        optimizer.eval()
        clock.now += 100.0
    state = optimizer.state_dict()
    if not is_told:
        del state["round"]["seconds"]
    optimizer.close()
    clock.now += 1000.0
    again = Counting()
    resumed = locally(again, again.sgd, every=4, dynamic=True, worker="w", clock=clock, **WHOLE)
    resumed.load_state_dict(state)
    for expected in (0.5 if is_told else None, 0.5):
        while True:
            clock.now += 2.0
            again.step(resumed)
            if resumed.steps == 0:
                break
        (worker,) = run.workers()
        assert worker.speed == expected
