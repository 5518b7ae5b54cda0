"""Steps whose push travels while the next batch is computed: the result, and the calls that handle the response."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from freestep import Client, EvalMode, Flat, Int8, RemoteOptimizer, Rounded, Run, TopK
from freestep.encoders import Encoder
from harness import ThreadService
from meanwhile import end, under_way, wait_for
from overlapped import Counting, what
from trained import held

BATCHES = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


def loss_of(model: nn.Module, number: int) -> Tensor:
    loss: Tensor = model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().sum()
    return loss


class Gate:
    """A client whose pushes wait until the gate is opened."""

    def __init__(self, url: str) -> None:
        self.is_open, self.reached = threading.Event(), threading.Event()
        self.client = Client(http=httpx.Client(base_url=url, event_hooks={"request": [self._pass]}))

    def _pass(self, request: httpx.Request) -> None:
        if request.url.path.endswith("/gradients"):
            self.reached.set()
            wait_for(self.is_open, "the gate is open")


@pytest.fixture
def gate(service: ThreadService) -> Iterator[Gate]:
    made = Gate(service.url)
    with made.client:
        yield made
        made.is_open.set()
        for thread in threading.enumerate():
            if thread.name == "freestep-push":
                end(thread)


# The result


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
    remotely: Callable[..., RemoteOptimizer],
    shards: int,
    closure: bool,
    options: dict[str, Any],
    encode: Callable[[Flat], Encoder] | None,
) -> None:
    model, seen = network(), []
    twin = network()
    optimizer = remotely(model, algorithm="adamw_schedule_free", lr=0.01, shards=shards, **options)

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


def test_receipts_come_one_step_late(remotely: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = remotely(model)
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


def test_an_ordinary_step_comes_after_the_push_in_flight(remotely: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = remotely(model)
    model.push(optimizer)
    model.push(optimizer, overlap=False)
    assert what(optimizer.receipt) == ("applied", None, 2, 1)
    assert model.counted == 2


def test_the_push_travels_while_its_caller_goes_on(remotely: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    """It sends the gradients as they were when `step` was called."""
    model = Counting()
    optimizer = remotely(model, client=gate.client)
    model.push(optimizer)
    wait_for(gate.reached, "a push is at the gate")
    assert model.count.grad is not None
    model.count.grad.fill_(5.0)
    optimizer.zero_grad(set_to_none=False)
    assert optimizer.receipt is None
    waiting = under_way(optimizer.flush)
    gate.is_open.set()
    waiting.result()
    assert model.counted == 1


def test_large_gradients_are_copied_too(remotely: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    model = nn.Linear(300, 300)
    begun = held(model)
    optimizer = remotely(model, client=gate.client)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(overlap=True)
    wait_for(gate.reached, "a push is at the gate")
    optimizer.zero_grad(set_to_none=False)
    gate.is_open.set()
    optimizer.flush()
    assert torch.equal(held(model), begun - 1.0)


def test_a_closure_is_evaluated_while_the_push_travels(remotely: Callable[..., RemoteOptimizer], gate: Gate) -> None:
    model = Counting()
    optimizer = remotely(model, client=gate.client)
    model.push(optimizer)
    wait_for(gate.reached, "a push is at the gate")

    def closure() -> float:
        assert model.counted == 0
        gate.is_open.set()
        model.count.grad = torch.full_like(model.count, -1.0)
        return 3.0

    assert optimizer.step(closure, overlap=True) == 3.0
    assert model.counted == 1
    optimizer.flush()
    assert model.counted == 2


# The calls that handle the response


@pytest.mark.parametrize("by", ["flush", "eval", "state_dict", "close"])
def test_the_answer_is_received_by(remotely: Callable[..., RemoteOptimizer], run: Run, by: str) -> None:
    model = Counting()
    optimizer = remotely(model)
    model.push(optimizer)
    model.push(optimizer)
    getattr(optimizer, by)()
    assert what(optimizer.receipt) == ("applied", None, 2, 1)
    assert model.counted == 2
    assert run.status().step == 2
    assert len(run.workers()) == (by != "close")


def test_evaluation_in_between(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = remotely(model, algorithm="sgd_schedule_free", lr=0.01)
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


def test_a_state_is_loaded_after_the_push_in_flight(remotely: Callable[..., RemoteOptimizer]) -> None:
    model = Counting()
    optimizer = remotely(model, push_encoding="int8")
    state = optimizer.state_dict()
    model.push(optimizer, -1.0)
    optimizer.load_state_dict(state)
    assert model.counted == 1
    model.push(optimizer, -1.0)
    optimizer.flush()
    assert model.counted == 2


def test_a_block_that_ends_waits_for_its_last_push(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = Counting()
    with remotely(model) as optimizer:
        model.push(optimizer)
    assert (model.counted, run.status().step) == (1, 1)
    assert run.workers() == []


def test_a_block_that_an_error_ends_waits_for_nothing(
    remotely: Callable[..., RemoteOptimizer], gate: Gate, run: Run
) -> None:
    model = Counting()
    with pytest.raises(KeyError, match="mine"):
        with remotely(model, client=gate.client) as optimizer:
            model.push(optimizer)
            wait_for(gate.reached, "a push is at the gate")
            raise KeyError("mine")
    assert run.workers() == []
