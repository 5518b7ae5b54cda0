"""LocalSteps against plain loops of the same arithmetic, and through what may happen to a round."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import schedulefree
import torch
from torch import Tensor, nn

from freestep import (
    Client,
    EvalMode,
    Flat,
    FreestepError,
    LocalSteps,
    ManifestMismatch,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
    RunNotFound,
    ServiceUnreachable,
)
from harness import ThreadService
from meanwhile import at_once
from proxies import Cutter

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
WHOLE = {"algorithm": "diloco", "lr": 1.0, "momentum": 0.0}
"""An outer optimizer that takes a round's progress as it is."""
ADAMW = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Callable[..., LocalSteps]]:
    """Makes optimizers of one run, over AdamW unless another is given; they are closed with the test."""
    made: list[LocalSteps] = []

    def optimizer(model: Any, inner: torch.optim.Optimizer | None = None, **options: Any) -> LocalSteps:
        given = {"run": name, "every": 5, "aggregation": "async", **options}
        inner = inner or torch.optim.AdamW(model.parameters(), **ADAMW)
        made.append(LocalSteps(model, inner, **(given if "client" in given else {"url": service.url, **given})))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, number: int) -> Tensor:
    loss: Tensor = model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().mean()
    return loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, **options: Any) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step(**options)


def held(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def hold(model: nn.Module, vector: Tensor) -> None:
    """In place, so that optimizers keep their state."""
    with torch.no_grad():
        for parameter, part in zip(
            model.parameters(), vector.split([each.numel() for each in model.parameters()]), strict=True
        ):
            parameter.copy_(part.view_as(parameter))


def pulled(run: Run, point: str = "y") -> Tensor:
    tensors, _ = run.pull(point)  # type: ignore[arg-type]
    return torch.cat([each.reshape(-1) for each in tensors.values()])


class Counting(nn.Module):
    """Parameters from 0 that a step of SGD with learning rate 1 makes larger by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(30))

    def step(self, optimizer: torch.optim.Optimizer, times: int = 1, value: float = 1.0, **options: Any) -> None:
        for _ in range(times):
            self.count.grad = torch.full_like(self.count, -value)
            optimizer.step(**options)

    @property
    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    @property
    def counted(self) -> float:
        assert (self.count == self.count[0]).all() or self.count.isnan().all()
        return float(self.count[0].item())


# What is computed


@pytest.mark.parametrize(("every", "shards"), [(1, 1), (1, 3), (4, 1)])
def test_a_whole_outer_step_leaves_the_inner_optimizer_alone(
    make: Callable[..., LocalSteps], every: int, shards: int
) -> None:
    model, twin = network(), network()
    peer = torch.optim.AdamW(twin.parameters(), **ADAMW)
    optimizer = make(model, every=every, shards=shards, **WHOLE)
    for number in range(20):
        step(model, optimizer, number)
        step(twin, peer, number)
        torch.testing.assert_close(held(model), held(twin), **TOLERANCE)
    assert optimizer.pulled is not None
    assert optimizer.pulled.step == 20 // every


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
    make: Callable[..., LocalSteps], shards: int, samples: tuple[float, float] | None
) -> None:
    models = [network(), network()]
    optimizers = [
        make(model, aggregation="sync", worker=f"w{number}", shards=shards) for number, model in enumerate(models)
    ]

    def work(worker: int) -> None:
        for number in range(30):
            own = None if samples is None else samples[worker]
            step(models[worker], optimizers[worker], 1000 * worker + number, samples=own)

    at_once(*(partial(work, worker) for worker in range(2)))
    expected = plain_diloco([network(), network()], 6, 5, list(samples or (1.0, 1.0)))
    for model, optimizer in zip(models, optimizers, strict=True):
        assert optimizer.pulled is not None
        assert optimizer.pulled.step == 6
        torch.testing.assert_close(held(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"push_dtype": "BF16"}, {"push_encoding": "int8"}, {"push_encoding": "topk", "topk_fraction": 0.3}]
)
def test_what_an_encoding_leaves_out_is_pushed_later(
    make: Callable[..., LocalSteps], run: Run, options: dict[str, Any]
) -> None:
    model = network()
    optimizer = make(model, **WHOLE, **options)
    after: list[Tensor] = []
    optimizer.inner.register_step_post_hook(lambda *_: after.append(held(model)))
    begun = held(model)
    progress = torch.zeros_like(begun)
    for number in range(40):
        before = held(model)
        step(model, optimizer, number)
        progress += after[-1] - before
    residual = optimizer.state_dict()["freestep"]["residual"]
    assert residual.abs().sum() > 0
    torch.testing.assert_close(begun + progress, pulled(run) - residual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_narrow_model_pushes_nothing_of_what_its_rounding_takes(
    make: Callable[..., LocalSteps], run: Run, dtype: str
) -> None:
    model = Counting()
    with torch.no_grad():
        model.count.fill_(1.001)
    model.bfloat16()
    optimizer = make(model, model.sgd, every=1, push_dtype=dtype, overlap=True, **WHOLE)
    # Another worker leaves y where a narrow model cannot have it.
    y = pulled(run)
    with run.lease("other") as lease:
        run.push({"count": torch.full((30,), 2.0**-12)}, lease.claim(0))
    for _ in range(5):
        model.step(optimizer, value=0.0)
    optimizer.flush()
    assert torch.equal(pulled(run), y - 2.0**-12)


def test_schedulers_of_the_inner_optimizer_work(make: Callable[..., LocalSteps]) -> None:
    model, twin = network(), network()
    peer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **WHOLE)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=20) for each in (optimizer.inner, peer)]
    for number in range(20):
        step(model, optimizer, number)
        step(twin, peer, number)
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(held(model), held(twin), **TOLERANCE)


def test_a_step_that_overflowed_is_none_of_the_round(make: Callable[..., LocalSteps]) -> None:
    model, twin = network(), network()
    peer = torch.optim.AdamW(twin.parameters(), **ADAMW)
    optimizer = make(model, every=3, **WHOLE)
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
    assert optimizer.pulled is not None
    assert (optimizer.pulled.step, optimizer.steps) == (2, 0)


def test_a_closure_is_evaluated_and_losses_are_averaged(make: Callable[..., LocalSteps], run: Run) -> None:
    model = network()
    optimizer = make(model, every=2)
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


def test_frozen_parameters_stay_out_and_tied_ones_are_one(make: Callable[..., LocalSteps]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    optimizer = make(model, every=2)
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


# Overlap


def test_progress_made_while_a_push_travels_is_kept(make: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, every=3, overlap=True, algorithm="diloco", lr=0.5, momentum=0.0)
    model.step(optimizer, 3)
    assert (model.counted, optimizer.receipt, optimizer.steps) == (3, None, 0)
    model.step(optimizer, 2)
    assert model.counted == 5
    optimizer.flush()
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.staleness) == ("applied", 0)
    # y is half of the 3, and the 2 are kept.
    assert (model.counted, optimizer.steps) == (3.5, 2)
    model.step(optimizer, 1)
    optimizer.flush()
    assert optimizer.receipt.staleness == 1
    assert model.counted == 3.0
    assert run.status().step == 2


def by_hand(url: str, spec: Any, model: nn.Module, rounds: int, every: int) -> Tensor:
    """The loop of rounds whose answers are received a round late."""
    inner = torch.optim.AdamW(model.parameters(), **ADAMW)
    with Client(url) as client:
        run = client.run(f"by-hand-{uuid.uuid4().hex[:8]}")
        run.create(spec.model_dump(mode="json"))
        run.initialize(dict(model.named_parameters()))
        start, arrived, taken_at = held(model), None, 0
        gradient, arriving = Flat(run.manifest), Flat(run.manifest)
        with run.lease() as lease:
            for number in range(rounds):
                for local in range(every):
                    step(model, inner, number * every + local)
                if arrived is not None:
                    progress = held(model) - start
                    hold(model, arrived + progress)
                    start = held(model) - progress
                gradient.vector.copy_(start - held(model))
                start = held(model)
                _, newest = run.exchange(gradient, lease.claim(taken_at), arriving)
                arrived, taken_at = arriving.vector.clone(), max(newest.step - 1, 0)
    assert arrived is not None
    return arrived


@pytest.mark.parametrize("shards", [1, 3])
def test_it_is_the_loop_with_one_round_of_delay(
    service: ThreadService, make: Callable[..., LocalSteps], shards: int
) -> None:
    model = network()
    optimizer = make(model, overlap=True, shards=shards)
    for number in range(30):
        step(model, optimizer, number)
    optimizer.flush()
    assert torch.equal(held(model), by_hand(service.url, optimizer.spec, network(), 6, 5))


@pytest.mark.parametrize(
    ("algorithm", "overlap", "policy", "max_staleness"),
    [
        ("diloco", False, "sync", None),
        ("gpa_sgd", True, "sync", 1),
        ("sgd_schedule_free", False, "ringmaster", None),
    ],
)
def test_momentum_waits_for_all_workers_by_default(
    make: Callable[..., LocalSteps], algorithm: str, overlap: bool, policy: str, max_staleness: int | None
) -> None:
    made = make(network(), algorithm=algorithm, overlap=overlap, aggregation=None).spec.aggregation
    assert (made.policy, made.max_staleness) == (policy, max_staleness)


def test_overlap_needs_a_policy_that_takes_late_gradients(make: Callable[..., LocalSteps], run: Run) -> None:
    with pytest.raises(ValueError, match="max_staleness"):
        make(network(), aggregation="sync", overlap=True)
    assert run.workers() == []


def test_sync_workers_may_overlap_where_one_step_of_staleness_is_allowed(make: Callable[..., LocalSteps]) -> None:
    models = [Counting(), Counting()]
    optimizers = [
        make(
            model,
            model.sgd,
            every=2,
            overlap=True,
            aggregation={"policy": "sync", "max_staleness": 1},
            worker=f"w{number}",
            **WHOLE,
        )
        for number, model in enumerate(models)
    ]

    def work(worker: int) -> None:
        models[worker].step(optimizers[worker], 8, value=1.0 + worker)
        optimizers[worker].flush()

    at_once(*(partial(work, worker) for worker in range(2)))
    assert [model.counted for model in models] == [12.0, 12.0]


# What may happen to a round


def test_a_round_may_be_ended_early(make: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, **WHOLE)
    optimizer.push()
    model.step(optimizer, 2)
    optimizer.push()
    assert (run.status().step, model.counted, optimizer.steps) == (1, 2.0, 0)
    model.step(optimizer, 4)
    optimizer.close()
    assert run.status().step == 1


def test_after_a_restore_a_round_is_dropped_and_said_so(make: Callable[..., LocalSteps], run: Run) -> None:
    for overlap in (False, True):
        model = Counting()
        optimizer = make(model, model.sgd, every=2, overlap=overlap, worker="me", **WHOLE)
        model.step(optimizer, 2)
        optimizer.flush()
        before = model.counted
        step_before = run.checkpoint().step
        model.step(optimizer, 1)
        run.restore(step_before)
        model.step(optimizer, 1)
        model.step(optimizer, int(overlap))
        optimizer.flush()
        assert optimizer.receipt is not None
        assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
        assert (model.counted, optimizer.steps) == (before, 0)
        model.step(optimizer, 2)
        optimizer.flush()
        assert optimizer.receipt.decision == "applied"
        assert model.counted == before + 2


def test_a_round_that_is_too_stale_is_dropped_and_said_so(make: Callable[..., LocalSteps], run: Run) -> None:
    model, other = Counting(), Counting()
    options = {"aggregation": {"policy": "async", "max_staleness": 0}, "every": 2, **WHOLE}
    optimizer, its = make(model, model.sgd, **options), make(other, other.sgd, **options)
    model.step(optimizer, 1)
    other.step(its, 2)
    model.step(optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "stale")
    assert (model.counted, optimizer.steps) == (2.0, 0)
    model.step(optimizer, 2)
    assert optimizer.receipt.decision == "applied"
    assert model.counted == 4.0


def test_a_fenced_off_worker_takes_a_new_lease_and_its_round_counts(make: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, every=2, worker="me", **WHOLE)
    model.step(optimizer, 1)
    run.lease("me").release()
    model.step(optimizer, 1)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, model.counted) == ("applied", 2.0)


def test_a_round_that_is_not_finite_is_refused_and_training_goes_on(make: Callable[..., LocalSteps], run: Run) -> None:
    for overlap in (False, True):
        model = Counting()
        optimizer = make(model, model.sgd, every=2, overlap=overlap, **WHOLE)
        before = model.counted
        model.step(optimizer, 1, value=float("nan"))
        with pytest.raises(NonFiniteGradient):
            model.step(optimizer, 1)
            optimizer.flush()
        assert (model.counted, optimizer.steps) == (before, 0)
        model.step(optimizer, 2)
        optimizer.flush()
        assert model.counted == before + 2
    assert run.status().step == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_push_of_which_nothing_is_known_is_sent_again_and_counts_once(
    service: ThreadService, make: Callable[..., LocalSteps], run: Run, overlap: bool
) -> None:
    to_come: list[int] = []
    cutter = Cutter(service.url, to_come)
    model = Counting()
    try:
        # A connection for each request.
        http = httpx.Client(base_url=cutter.url, headers={"Connection": "close"})
        with Client(http=http, retry_for=0) as client:
            optimizer = make(model, model.sgd, every=2, client=client, lease_ttl_ms=3_600_000, overlap=overlap, **WHOLE)
            model.step(optimizer, 2)
            optimizer.flush()
            # So many bytes come of the next answers.
            to_come += [0, 100]
            model.step(optimizer, 1)
            with pytest.raises(ServiceUnreachable):
                model.step(optimizer, 1)
                optimizer.flush()
            with pytest.raises(ServiceUnreachable):
                optimizer.flush()
            model.step(optimizer, 1)
            assert (model.counted, optimizer.steps) == (5.0, 1)
            model.step(optimizer, 1)
            optimizer.close()
    finally:
        cutter.close()
    assert (model.counted, optimizer.steps, run.status().step) == (6.0, 0, 3)


def test_a_run_that_was_deleted_is_said_to_be_gone(make: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, every=1, **WHOLE)
    run.delete()
    with pytest.raises(RunNotFound):
        model.step(optimizer)


# Points, and what is saved


@pytest.mark.parametrize("overlap", [False, True])
def test_evaluation_leaves_the_round_alone(make: Callable[..., LocalSteps], run: Run, overlap: bool) -> None:
    models = [network(), network()]
    for seen, model in enumerate(models):
        optimizer = make(model, every=3, overlap=overlap, run=f"{run.name}-{seen}", algorithm="sgd_schedule_free")
        for number in range(12):
            step(model, optimizer, number)
            optimizer.flush()
            if seen:
                before = held(model)
                optimizer.eval()
                optimizer.eval()
                assert torch.equal(held(model), pulled(optimizer._run, "x"))
                for what in (optimizer.step, optimizer.push):
                    with pytest.raises(EvalMode, match="train\\(\\)"):
                        what()
                optimizer.train()
                optimizer.train()
                assert torch.equal(held(model), before)
    assert torch.equal(held(models[0]), held(models[1]))


@pytest.mark.parametrize("at_x", [False, True])
def test_a_saved_worker_goes_on_in_its_round(make: Callable[..., LocalSteps], at_x: bool) -> None:
    model, twin = network(), network()
    optimizer = make(model, worker="saved")
    straight = make(twin, run=f"straight-{uuid.uuid4().hex[:8]}")
    for number in range(8):
        step(model, optimizer, number)
        step(twin, straight, number)
    if at_x:
        optimizer.eval()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.close()
    again = network(1)
    resumed = make(again, worker="other")
    step(again, resumed, 50)
    resumed.load_state_dict(state)
    assert (resumed.worker, resumed.steps) == ("saved", 3)
    torch.testing.assert_close(held(again), held(twin), **TOLERANCE)
    for number in range(8, 17):
        step(again, resumed, number)
        step(twin, straight, number)
    torch.testing.assert_close(held(again), held(twin), **TOLERANCE)
    assert resumed.pulled is not None
    assert resumed.pulled.step == 3


def test_a_saved_round_of_an_epoch_that_is_over_is_dropped(make: Callable[..., LocalSteps], run: Run) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, **WHOLE)
    model.step(optimizer, 2)
    state = optimizer.state_dict()
    run.restore(run.checkpoint().step)
    optimizer.load_state_dict(state)
    assert optimizer.receipt is not None
    assert (optimizer.receipt.decision, optimizer.receipt.reason) == ("dropped", "epoch-changed")
    assert (model.counted, optimizer.steps) == (0.0, 0)


def test_a_state_of_something_else_is_refused(
    service: ThreadService, make: Callable[..., LocalSteps], name: str
) -> None:
    model = Counting()
    optimizer = make(model, model.sgd, **WHOLE)
    model.step(optimizer, 2)
    with RemoteOptimizer(Counting(), url=service.url, run=name, **WHOLE) as other:
        strange = other.state_dict()
    with pytest.raises(ManifestMismatch, match="LocalSteps"):
        optimizer.load_state_dict(strange)
    assert (model.counted, optimizer.steps) == (2.0, 2)


# What is refused


def test_an_inner_optimizer_with_points_of_its_own_is_refused() -> None:
    model = network()
    inner = schedulefree.AdamWScheduleFree(model.parameters())
    with pytest.raises(FreestepError, match="AdamWScheduleFree keeps points"):
        LocalSteps(model, inner, every=2, run="any")


def test_other_parameters_than_the_inner_optimizers_are_refused(make: Callable[..., LocalSteps]) -> None:
    model = network()
    for parameters, words in (
        (model[0].parameters(), r"does not have the parameter '2\.weight'"),
        ([*model.parameters(), nn.Parameter(torch.ones(7))], r"another parameter, of shape \[7\]"),
    ):
        with pytest.raises(ManifestMismatch, match=words):
            make(model, torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize(
    ("options", "words"), [({"every": 0}, "at least one step"), ({"process_group": True}, "process_group")]
)
def test_what_cannot_be_is_said(make: Callable[..., LocalSteps], options: dict[str, Any], words: str) -> None:
    with pytest.raises(FreestepError, match=words):
        make(network(), **options)


def test_the_runs_learning_rate_is_not_the_inner_ones(
    make: Callable[..., LocalSteps], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="freestep"):
        optimizer = make(network())
    assert (optimizer.spec.optimizer.algorithm, optimizer.spec.optimizer.lr) == ("diloco", 0.7)
    assert optimizer.inner.param_groups[0]["lr"] == ADAMW["lr"]
    assert not caplog.text


def test_a_worker_holds_three_vectors(make: Callable[..., LocalSteps]) -> None:
    optimizer = make(network())
    kept = [*vars(optimizer).values(), *vars(optimizer._gradients).values(), *vars(optimizer._round).values()]
    assert sum(isinstance(value, Flat) for value in kept) == 3


# Workers of different speeds


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_slower_workers_take_fewer_steps(make: Callable[..., LocalSteps], run: Run) -> None:
    seconds = {"fast": 0.5, "half": 1.0, "third": 1.5, "snail": 64.0}
    clocks = {name: Clock() for name in seconds}
    models = {name: Counting() for name in seconds}
    optimizers = {
        name: make(model, model.sgd, every=12, dynamic=True, worker=name, clock=clocks[name], **WHOLE)
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
