"""Steps whose push travels while the next batch is computed: what they compute, and what may happen to them."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from freestep import (
    Client,
    EvalMode,
    Flat,
    Int8,
    NonFiniteGradient,
    Receipt,
    RemoteOptimizer,
    Rounded,
    Run,
    RunNotFound,
    ServiceUnreachable,
    TopK,
)
from freestep.encoders import Encoder
from harness import ProcessService, ThreadService
from meanwhile import under_way
from proxies import Cutter
from trained import held

BATCHES = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


def loss_of(model: nn.Module, number: int) -> Tensor:
    loss: Tensor = model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().sum()
    return loss


class Counting(nn.Module):
    """Parameters from 0 whose every gradient is -1: at a run of plain SGD they count the pushes that were applied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(30))

    def push(self, optimizer: RemoteOptimizer, value: float = -1.0, **options: Any) -> None:
        self.count.grad = torch.full_like(self.count, value)
        optimizer.step(**{"overlap": True, **options})

    @property
    def counted(self) -> int:
        assert (self.count == self.count[0]).all()
        return int(self.count[0].item())


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Callable[..., RemoteOptimizer]]:
    """Makes optimizers of one run that takes every gradient off its parameters; they are closed with the test."""
    made: list[RemoteOptimizer] = []

    def optimizer(model: nn.Module, **options: Any) -> RemoteOptimizer:
        given = {"run": name, "algorithm": "sgd", "lr": 1.0, "aggregation": "async", **options}
        made.append(RemoteOptimizer(model, **(given if "client" in given else {"url": service.url, **given})))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


class Gate:
    """A client whose pushes wait until the gate is opened."""

    def __init__(self, url: str) -> None:
        self.is_open, self.reached = threading.Event(), threading.Event()
        self.client = Client(http=httpx.Client(base_url=url, event_hooks={"request": [self._pass]}))

    def _pass(self, request: httpx.Request) -> None:
        if request.url.path.endswith("/gradients"):
            self.reached.set()
            self.is_open.wait()


@pytest.fixture
def gate(service: ThreadService) -> Iterator[Gate]:
    made = Gate(service.url)
    with made.client:
        yield made
        made.is_open.set()
        for thread in threading.enumerate():
            if thread.name == "freestep-push":
                thread.join()


def what(receipt: Receipt | None) -> tuple[str, str | None, int, int] | None:
    return None if receipt is None else (receipt.decision, receipt.reason, receipt.step, receipt.staleness)


# What is computed


def by_hand(
    url: str, spec: dict[str, Any], model: nn.Module, encode: Callable[[Flat], Encoder] | None, dtype: str
) -> list[Tensor]:
    """Trains with every push answered at once, but its y loaded only after the next gradient was taken."""
    seen = []
    with Client(url) as client:
        run = client.run(f"by-hand-{uuid.uuid4().hex[:8]}")
        run.create(spec)
        run.initialize(dict(model.named_parameters()))
        gradient, arriving = Flat(run.manifest), Flat(run.manifest, dtype)
        encoder = None if encode is None else encode(gradient)
        taken_at = arrived = run.pull_into(arriving, "y")
        arriving.scatter(dict(model.named_parameters()))
        with run.lease() as lease:
            for number in range(BATCHES):
                model.zero_grad()
                loss_of(model, number).backward()
                gradient.fill({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
                arriving.scatter(dict(model.named_parameters()))
                seen.append(held(model))
                if encoder is not None:
                    encoder.begin()
                before, taken_at = taken_at, arrived
                _, arrived = run.exchange(encoder or gradient, lease.claim(before.step), arriving)
        arriving.scatter(dict(model.named_parameters()))
    return [*seen, held(model)]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    ("options", "encode"),
    [
        ({}, None),
        ({"push_dtype": "BF16"}, lambda flat: Rounded(flat, "BF16")),
        ({"push_encoding": "int8", "pull_dtype": "I8"}, Int8),
        ({"push_encoding": "topk", "topk_fraction": 0.1, "pull_dtype": "BF16"}, lambda flat: TopK(flat, 0.1)),
    ],
)
def test_it_is_the_loop_with_one_step_of_delay(
    service: ThreadService,
    make: Callable[..., RemoteOptimizer],
    shards: int,
    closure: bool,
    options: dict[str, Any],
    encode: Callable[[Flat], Encoder] | None,
) -> None:
    model, seen = network(), []
    twin = network()
    optimizer = make(model, algorithm="adamw_schedule_free", lr=0.01, shards=shards, **options)

    def backward(number: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss.detach()

    for number in range(BATCHES):
        if closure:
            assert optimizer.step(lambda number=number: backward(number), overlap=True) is not None
        else:
            backward(number)
            assert optimizer.step(overlap=True) is None
        seen.append(held(model))
    optimizer.flush()
    seen.append(held(model))
    spec = optimizer.spec.model_dump(mode="json")
    expected = by_hand(service.url, spec, twin, encode, options.get("pull_dtype", "F32"))
    assert len({tuple(each.tolist()) for each in seen}) == BATCHES + 1
    for number, (mine, theirs) in enumerate(zip(seen, expected, strict=True)):
        assert torch.equal(mine, theirs), number


def test_receipts_come_one_step_late(make: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = make(model)
    seen = []
    for _ in range(3):
        model.push(optimizer)
        seen.append((what(optimizer.receipt), model.counted))
    optimizer.flush()
    seen.append((what(optimizer.receipt), model.counted))
    applied = [("applied", None, 1, 0), ("applied", None, 2, 1), ("applied", None, 3, 1)]
    assert seen == [*zip([None, *applied], range(4), strict=True)]
    optimizer.flush()
    assert model.counted == 3


def test_an_ordinary_step_comes_after_the_push_in_flight(make: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = make(model)
    model.push(optimizer)
    model.push(optimizer, overlap=False)
    assert what(optimizer.receipt) == ("applied", None, 2, 1)
    assert model.counted == 2


def test_the_push_travels_while_its_caller_goes_on(make: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    """And takes with it what the gradients were, whatever becomes of them."""
    model = Counting()
    optimizer = make(model, client=gate.client)
    model.push(optimizer)
    gate.reached.wait()
    assert model.count.grad is not None
    model.count.grad.fill_(5.0)
    optimizer.zero_grad(set_to_none=False)
    assert optimizer.receipt is None
    waiting = under_way(optimizer.flush)
    gate.is_open.set()
    waiting.result()
    assert model.counted == 1


def test_large_gradients_are_copied_too(make: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    model = nn.Linear(300, 300)
    begun = held(model)
    optimizer = make(model, client=gate.client)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(overlap=True)
    gate.reached.wait()
    optimizer.zero_grad(set_to_none=False)
    gate.is_open.set()
    optimizer.flush()
    assert torch.equal(held(model), begun - 1.0)


def test_a_closure_is_evaluated_while_the_push_travels(make: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    model = Counting()
    optimizer = make(model, client=gate.client)
    model.push(optimizer)
    gate.reached.wait()

    def closure() -> float:
        assert model.counted == 0
        gate.is_open.set()
        model.count.grad = torch.full_like(model.count, -1.0)
        return 3.0

    assert optimizer.step(closure, overlap=True) == 3.0
    assert model.counted == 1
    optimizer.flush()
    assert model.counted == 2


# What receives the answer


@pytest.mark.parametrize("by", ["flush", "eval", "state_dict", "close"])
def test_the_answer_is_received_by(make: Callable[..., RemoteOptimizer], run: Run, by: str) -> None:
    model = Counting()
    optimizer = make(model)
    model.push(optimizer)
    model.push(optimizer)
    getattr(optimizer, by)()
    assert what(optimizer.receipt) == ("applied", None, 2, 1)
    assert model.counted == 2
    assert run.status().step == 2
    assert len(run.workers()) == (by != "close")


def test_evaluation_in_between(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = make(model, algorithm="sgd_schedule_free", lr=0.01)
    for number in range(4):
        for part in range(2):
            optimizer.zero_grad()
            loss_of(model, 2 * number + part).backward()
            optimizer.step(overlap=True)
        optimizer.eval()
        x, step = run.pull("x")
        assert step == 2 * number + 2
        assert torch.equal(held(model), torch.cat([each.reshape(-1) for each in x.values()]))
        with pytest.raises(EvalMode):
            optimizer.step(overlap=True)
        optimizer.train()
        y, _ = run.pull("y")
        assert torch.equal(held(model), torch.cat([each.reshape(-1) for each in y.values()]))


def test_a_state_is_loaded_after_the_push_in_flight(make: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = make(model, push_encoding="int8")
    state = optimizer.state_dict()
    model.push(optimizer, -1.0)
    optimizer.load_state_dict(state)
    assert model.counted == 1
    model.push(optimizer, -1.0)
    optimizer.flush()
    assert model.counted == 2


def test_a_block_that_ends_waits_for_its_last_push(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = Counting()
    with make(model) as optimizer:
        model.push(optimizer)
    assert (model.counted, run.status().step) == (1, 1)
    assert run.workers() == []


def test_a_block_that_an_error_ends_waits_for_nothing(
    make: Callable[..., RemoteOptimizer], gate: Gate, run: Run
) -> None:
    model = Counting()
    with pytest.raises(KeyError, match="mine"):
        with make(model, client=gate.client) as optimizer:
            model.push(optimizer)
            gate.reached.wait()
            raise KeyError("mine")
    assert run.workers() == []


# What the push fails with


@pytest.mark.parametrize("by", ["flush", "eval", "state_dict", "close", "step"])
def test_a_refusal_is_raised_by(make: Callable[..., RemoteOptimizer], run: Run, by: str) -> None:
    model = Counting()
    optimizer = make(model, worker="me")
    model.push(optimizer, float("nan"))
    model.count.grad = torch.full_like(model.count, -1.0)
    with pytest.raises(NonFiniteGradient):
        getattr(optimizer, by)()
    assert (model.counted, optimizer.receipt) == (0, None)
    assert len(run.workers()) == (by != "close")
    if by != "close":
        # It was told once, and the gradients that came after it are there still.
        optimizer.step(overlap=True)
        optimizer.flush()
        assert model.counted == run.status().step == 1


def test_a_run_that_is_gone_is_said_to_be(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = Counting()
    optimizer = make(model)
    run.delete()
    model.push(optimizer)
    with pytest.raises(RunNotFound):
        model.push(optimizer)
    optimizer.flush()


@pytest.mark.parametrize("options", [{}, {"push_dtype": "F16"}, {"push_encoding": "int8"}], ids=str)
def test_a_push_of_which_nothing_was_heard_is_sent_again_and_counts_once(
    service: ThreadService, make: Callable[..., RemoteOptimizer], run: Run, options: dict[str, Any]
) -> None:
    to_come: list[int] = []
    model = Counting()
    with Cutter(service.url, to_come) as cutter, cutter.client() as client:
        optimizer = make(model, client=client, lease_ttl_ms=3_600_000, **options)
        model.push(optimizer)
        optimizer.flush()
        # So many bytes come of the next answers.
        to_come += [0, 100]
        model.push(optimizer)
        for _ in range(2):
            with pytest.raises(ServiceUnreachable):
                model.push(optimizer)
            assert model.counted == 1
        model.push(optimizer)
        optimizer.flush()
        optimizer.close()
    # What was in flight once, and what was pushed when it had landed.
    assert (model.counted, run.status().step) == (3, 3)


def test_closing_without_an_answer_is_closing(start_service: Callable[..., ThreadService], name: str) -> None:
    service, model = start_service(), Counting()
    with Client(service.url, retry_for=0) as client:
        optimizer = RemoteOptimizer(model, client=client, run=name, algorithm="sgd", aggregation="async")
        service.stop()
        model.push(optimizer)
        for _ in range(2):
            with pytest.raises(ServiceUnreachable):
                optimizer.flush()
        with pytest.raises(ServiceUnreachable):
            optimizer.close()
        optimizer.close()


def test_the_wrong_policies_are_refused(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    for number, aggregation in enumerate(
        (
            "sync",
            {"policy": "quorum", "batch": 1},
            {"policy": "rennala", "batch": 1},
            {"policy": "async", "max_staleness": 0},
        )
    ):
        model = Counting()
        optimizer = make(model, run=f"{run.name}-{number}", aggregation=aggregation)
        with pytest.raises(ValueError, match=r"a step late.*max_staleness is 0"):
            model.push(optimizer)
        model.push(optimizer, overlap=False)
        assert model.counted == 1


@pytest.mark.parametrize("policy", ["sync", "quorum", "rennala"])
def test_with_a_staleness_of_one_they_are_not(make: Callable[..., RemoteOptimizer], policy: str) -> None:
    model = Counting()
    batch = {} if policy == "sync" else {"batch": 1}
    optimizer = make(model, aggregation={"policy": policy, "max_staleness": 1, **batch})
    for _ in range(3):
        model.push(optimizer)
    optimizer.flush()
    assert model.counted == 3


# Leases and epochs


@pytest.mark.parametrize("by", ["flush", "step"])
def test_a_push_under_a_lease_that_is_lost_counts_under_the_next(
    make: Callable[..., RemoteOptimizer], run: Run, by: str
) -> None:
    model = Counting()
    optimizer = make(model, worker="me")
    model.push(optimizer)
    optimizer.flush()
    run.lease("me").release()
    model.push(optimizer)
    if by == "step":
        model.push(optimizer)
    optimizer.flush()
    assert model.counted == run.status().step == (2 if by == "flush" else 3)
    assert run.status().pushes["dropped"] == 0


@pytest.mark.parametrize("change", ["restored", "resharded"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_in_flight_in_an_epoch_that_ends_is_dropped_and_so_is_what_follows_it(
    make: Callable[..., RemoteOptimizer], run: Run, shards: int, change: str
) -> None:
    model = Counting()
    optimizer = make(model, shards=shards)
    model.push(optimizer)
    optimizer.flush()
    if change == "restored":
        run.checkpoint()
        model.push(optimizer)
        model.push(optimizer)
        optimizer.flush()
        assert model.counted == 3
        run.restore(1)
    else:
        run.reshard(2)
    model.push(optimizer)
    optimizer.flush()
    assert what(optimizer.receipt) == ("dropped", "epoch-changed", 1, 0)
    if change == "restored":
        run.restore(1)
    else:
        run.reshard(3)
    model.push(optimizer)
    optimizer.receipt = None
    # Taken at y of the epoch before.
    model.push(optimizer)
    assert what(optimizer.receipt) == ("dropped", "epoch-changed", 1, 0)
    assert model.counted == 1
    model.push(optimizer)
    model.push(optimizer)
    optimizer.flush()
    assert model.counted == run.status().step == 3


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_service_that_goes_while_a_push_is_in_flight(
    start_process: Callable[..., ProcessService], name: str, end: str
) -> None:
    service, model = start_process(), Counting()
    with (
        Client(service.url) as client,
        RemoteOptimizer(model, url=service.url, run=name, algorithm="sgd", lr=1.0, aggregation="async") as optimizer,
    ):
        for _ in range(3):
            model.push(optimizer)
        optimizer.flush()
        client.run(name).checkpoint()
        service.send_signal(signal.SIGSTOP)
        model.push(optimizer)
        if end == "killed":
            service.kill()
        else:
            service.stop()
        service.start()
        model.push(optimizer)
        model.push(optimizer)
        optimizer.flush()
        status = client.run(name).status()
        y, step = client.run(name).pull("y")
    # In a new epoch the first two are of no use; else each counts once, whether or not the service had it before.
    assert (status.epoch, step) == ((2, 4) if end == "killed" else (1, 6))
    assert model.counted == step
    assert torch.equal(y["count"], model.count)
