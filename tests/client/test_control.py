"""Workers of runs that are changed, paused and resumed while they train, and the calls that do so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freestep import (
    InvalidSpec,
    MalformedRequest,
    Pulled,
    RemoteOptimizer,
    Run,
    RunPaused,
    WorkerSuspended,
    joined_optimizer,
    pushing_optimizer,
)
from freestep.transport import Transport
from meanwhile import under_way, wait_until
from trained import network, step


class Clock:
    """Seconds, which pass while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def pausing(times: int, asked: list[str], clock: Clock, retry_for: float) -> Transport:
    """A transport to a run that refuses so many requests, since it is paused."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) <= times:
            return httpx.Response(503, json=RunPaused().to_document(503), headers={"Retry-After": "5"})
        return httpx.Response(200, json={})

    http = httpx.Client(base_url="http://service.test", transport=httpx.MockTransport(answer))
    return Transport(http, retry_for, clock=clock, sleep=clock.sleep)


def test_a_pause_is_waited_out_however_long_it_takes_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []
    clock = Clock()
    caplog.set_level(logging.WARNING, "freestep")
    assert pausing(1000, asked, clock, 30.0).request("POST", "/v1/runs/r/gradients").status == 200
    assert len(asked) == 1001
    # Not all of those who wait come at once.
    assert 2500 - 32 <= clock.now <= 5000
    assert [record.getMessage() for record in caplog.records] == [
        "/v1/runs/r/gradients is refused, since the run is paused: it waits until the run is resumed",
        f"/v1/runs/r/gradients goes on, after a pause of {clock.now:.0f} s",
    ]


def test_a_short_pause_is_noticed_soon_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    pausing(3, [], clock, 30.0).request("POST", "/v1/runs/r/gradients")
    # Of 0.1, 0.2 and 0.4 s, each at random from its half on.
    assert 0.35 <= clock.now <= 0.7
    assert not caplog.records


def test_who_repeats_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []
    with pytest.raises(RunPaused) as refusal:
        pausing(1, asked, Clock(), 0.0).request("POST", "/v1/runs/r/gradients")
    assert (refusal.value.retry_after, len(asked)) == (5.0, 1)
    with pytest.raises(RunPaused):
        pausing(1, [], Clock(), 30.0).request("POST", "/v1/runs/r/gradients", retry=False)


@pytest.mark.parametrize("while_asked", [True, False])
def test_once_sigterm_has_come_nobody_waits_for_a_paused_run(
    monkeypatch: pytest.MonkeyPatch, while_asked: bool
) -> None:
    class Told(Clock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            monkeypatch.setattr("freestep.leaving._is_leaving", True)

    class Asked(list[str]):
        def append(self, path: str) -> None:
            super().append(path)
            monkeypatch.setattr("freestep.leaving._is_leaving", while_asked)

    asked, clock = Asked(), Told()
    with pytest.raises(RunPaused):
        pausing(2, asked, clock, 30.0).request("POST", "/v1/runs/r/gradients")
    assert len(asked) == 1
    assert (clock.now == 0) is while_asked


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_waits_until_its_run_is_resumed(
    remotely: Callable[..., RemoteOptimizer], run: Run, shards: int, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = remotely(model, aggregation={"policy": "async"}, shards=shards)
    step(model, optimizer, 0)
    assert run.pause().control.paused
    caplog.set_level(logging.WARNING, "freestep")

    def steps() -> int:
        for number in (1, 2):
            step(model, optimizer, number, overlap=overlap)
        optimizer.flush()
        return optimizer.loaded.step

    working = under_way(steps)
    wait_until(lambda: any("is paused" in record.getMessage() for record in caplog.records))
    assert run.pull("x")[1] == run.status().step == 1
    assert not run.resume().control.paused
    assert working.result() == 3
    told = [record.getMessage() for record in caplog.records if "paused" in record.getMessage()]
    assert len(told) == 1


def test_a_worker_sees_the_rate_that_was_set(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = remotely(model, algorithm="sgd", lr=0.5, aggregation={"policy": "async"})
    step(model, optimizer, 0)
    assert optimizer.param_groups[0]["scheduled_lr"] == 0.5
    status = run.set(lr=0.125, momentum=0.9, aggregation={"max_staleness": 7})
    assert status.in_force.optimizer.model_dump()["lr"] == 0.125
    assert status.in_force.aggregation.max_staleness == 7
    assert status.spec.optimizer.model_dump()["lr"] == 0.5
    step(model, optimizer, 1)
    assert optimizer.param_groups[0]["scheduled_lr"] == 0.125
    # A worker that is started as the others were joins them.
    other = network()
    joined = remotely(other, algorithm="sgd", lr=0.5, aggregation={"policy": "async"}, worker="another")
    step(other, joined, 2)
    assert joined.param_groups[0]["scheduled_lr"] == 0.125
    with pytest.raises(InvalidSpec, match="belongs to the run"):
        run.set(algorithm="adamw")
    with pytest.raises(InvalidSpec, match=r"optimizer\.lr: must be finite"):
        run.set(lr=float("nan"))


def test_a_worker_waits_for_updates_once_its_policy_has_them_wait(
    remotely: Callable[..., RemoteOptimizer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled: list[float] = []
    logged: list[list[float]] = []
    pull_into = Run.pull_into

    def noting(*args: Any, wait: float = 0.0, **options: Any) -> Pulled:
        if threading.current_thread() is not threading.main_thread():
            pulled.append(wait)
        return pull_into(*args, wait=wait, **options)

    monkeypatch.setattr(Run, "pull_into", noting)
    monkeypatch.setattr(pushing_optimizer, "log_update_wait", lambda *_: logged.append([*pulled]))
    models = [network(), network()]
    first, second = (
        remotely(model, aggregation={"policy": "async"}, worker=worker)
        for model, worker in zip(models, ["first", "second"], strict=True)
    )
    step(models[0], first, 0)
    run.set(aggregation={"policy": "sync"})
    step(models[0], first, 1)
    assert first.receipt is not None and first.receipt.decision == "accumulated"
    # The service tells it that it has given its push, and it waits for the other's.
    waiting = under_way(lambda: step(models[0], first, 2))
    wait_until(lambda: run.status().pushes["dropped"] == 1)
    step(models[1], second, 2)
    if second.receipt is not None and second.receipt.decision == "dropped":
        # Its gradient was of the step before the policy changed.
        step(models[1], second, 3)
    waiting.result()
    assert run.status().step == first.loaded.step == 2
    # It has waited before it says whom it waits for.
    assert pulled[0] == pushing_optimizer.FIRST_WAIT_S
    assert [] not in logged


def test_a_worker_waits_no_longer_once_its_policy_has_nobody_wait(
    remotely: Callable[..., RemoteOptimizer], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_optimizer, "_WAIT_S", 0.25)
    monkeypatch.setattr(pushing_optimizer, "FIRST_WAIT_S", 0.25)
    model = network()
    optimizer = remotely(model, aggregation={"policy": "quorum", "batch": 2})
    waiting = under_way(lambda: step(model, optimizer, 0))
    wait_until(lambda: run.status().pushes["accumulated"] == 1)
    run.set(aggregation={"policy": "buffered", "batch": 3})
    waiting.result(30)
    assert optimizer.receipt is not None and optimizer.receipt.decision == "accumulated"
    step(model, optimizer, 1)
    assert run.status().step == optimizer.loaded.step == 0
    step(model, optimizer, 2)
    assert run.status().step == optimizer.loaded.step == 1


def test_a_worker_whose_lease_is_ended_takes_another(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = remotely(model, aggregation={"policy": "async"}, worker="me/too")
    step(model, optimizer, 0)
    assert run.end_worker("me/too").ended
    step(model, optimizer, 1)
    assert optimizer.loaded.step == 2


def test_a_worker_that_is_suspended_ends(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = remotely(model, aggregation={"policy": "async"}, worker="me")
    step(model, optimizer, 0)
    assert run.end_worker("me", ban=3600).suspended_ms == 3_600_000
    with pytest.raises(WorkerSuspended, match="an operator has ended") as refusal:
        step(model, optimizer, 1)
    assert refusal.value.retry_after is not None and refusal.value.retry_after > 3500
    with pytest.raises(WorkerSuspended):
        remotely(network(), worker="me")
    with pytest.raises(MalformedRequest, match="ban"):
        run.end_worker("me", ban=0.5)  # type: ignore[arg-type]
    with pytest.raises(WorkerSuspended):
        remotely(network(), worker="me")
    assert not run.end_worker("me", ban=0).ended
    step(model, optimizer, 2)
    assert run.status().step == 2


def test_names_that_paths_resolve_lead_to_nothing_else(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    step(model, remotely(model), 0)
    for name in (".", ".."):
        assert not run.end_worker(name).ended
        with pytest.raises(MalformedRequest):
            run.lease(name)
        with pytest.raises(MalformedRequest):
            run.data(name).create({"length": 1, "unit": 1})
    assert run.status().step == 1
