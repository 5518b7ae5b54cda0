"""Steps whose push travels while the next batch is computed: what it fails with, and what that does to the next."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from freestep import Client, NonFiniteGradient, RemoteOptimizer, Run, RunNotFound, ServiceUnreachable
from harness import ProcessService, ThreadService
from overlapped import Counting, what
from proxies import Cutter


@pytest.mark.parametrize("by", ["flush", "eval", "state_dict", "close", "step"])
def test_a_refusal_is_raised_by(remotely: Callable[..., RemoteOptimizer], run: Run, by: str) -> None:
    model = Counting()
    optimizer = remotely(model, worker="me")
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


def test_a_run_that_is_gone_is_said_to_be(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = Counting()
    optimizer = remotely(model)
    run.delete()
    model.push(optimizer)
    with pytest.raises(RunNotFound):
        model.push(optimizer)
    optimizer.flush()


@pytest.mark.parametrize("options", [{}, {"push_dtype": "F16"}, {"push_encoding": "int8"}], ids=str)
def test_a_push_of_which_nothing_was_heard_is_sent_again_and_counts_once(
    service: ThreadService, remotely: Callable[..., RemoteOptimizer], run: Run, options: dict[str, Any]
) -> None:
    to_come: list[int] = []
    model = Counting()
    with Cutter(service.url, to_come) as cutter, cutter.client() as client:
        optimizer = remotely(model, client=client, lease_ttl_ms=3_600_000, **options)
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


def test_the_wrong_policies_are_refused(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    for number, aggregation in enumerate(
        (
            "sync",
            {"policy": "quorum", "batch": 1},
            {"policy": "rennala", "batch": 1},
            {"policy": "async", "max_staleness": 0},
        )
    ):
        model = Counting()
        optimizer = remotely(model, run=f"{run.name}-{number}", aggregation=aggregation)
        with pytest.raises(ValueError, match=r"one step stale.*max_staleness is 0"):
            model.push(optimizer)
        model.push(optimizer, overlap=False)
        assert model.counted == 1


@pytest.mark.parametrize("policy", ["sync", "quorum", "rennala"])
def test_with_a_staleness_of_one_they_are_not(remotely: Callable[..., RemoteOptimizer], policy: str) -> None:
    model = Counting()
    batch = {} if policy == "sync" else {"batch": 1}
    optimizer = remotely(model, aggregation={"policy": policy, "max_staleness": 1, **batch})
    for _ in range(3):
        model.push(optimizer)
    optimizer.flush()
    assert model.counted == 3


# Leases and epochs


@pytest.mark.parametrize("by", ["flush", "step"])
def test_a_push_under_a_lease_that_is_lost_counts_under_the_next(
    remotely: Callable[..., RemoteOptimizer], run: Run, by: str
) -> None:
    model = Counting()
    optimizer = remotely(model, worker="me")
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
    remotely: Callable[..., RemoteOptimizer], run: Run, shards: int, change: str
) -> None:
    model = Counting()
    optimizer = remotely(model, shards=shards)
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
    before = optimizer.receipt
    # Taken at y of the epoch before.
    model.push(optimizer)
    assert optimizer.receipt is not before
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
