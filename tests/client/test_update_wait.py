"""What a worker logs while its update waits for the pushes of others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest

from freestep import AggregationSpec, RemoteOptimizer, Run, ServiceUnreachable, joined_optimizer, pushing_optimizer
from freestep.api.models import WorkerStatus
from freestep.update_wait import log_update_wait
from meanwhile import under_way, wait_until
from trained import network, step

POLICIES = [
    ({"policy": "sync"}, "waits for the pushes of 'idle', 'late'"),
    (
        {"policy": "quorum", "batch": 3},
        "waits for 2 more of the 3 pushes that make it; live workers without one are 'idle', 'late'",
    ),
    (
        {"policy": "buffered", "batch": 3, "robust": "coordinate_median"},
        "waits for 2 more of the 3 pushes that make it; live workers without one are 'idle', 'late'",
    ),
]


@pytest.mark.parametrize(("aggregation", "said"), POLICIES, ids=["sync", "quorum", "median"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_worker_says_whom_it_waits_for_and_goes_on_when_they_push(
    remotely: Callable[..., RemoteOptimizer],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    aggregation: dict[str, object],
    said: str,
    shards: int,
) -> None:
    monkeypatch.setattr(pushing_optimizer, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(joined_optimizer, "_WAIT_S", 0.1)
    caplog.set_level(logging.WARNING, "freestep")
    models = [network(), network(), network()]
    waiting, idle, late = (
        remotely(model, aggregation=aggregation, worker=worker, shards=shards)
        for model, worker in zip(models, ["waiting", "idle", "late"], strict=True)
    )

    def lines() -> list[str]:
        return [line for line in caplog.messages if "waits for" in line]

    stepping = under_way(partial(step, models[0], waiting, 0))
    wait_until(lambda: len(lines()) >= 2)
    assert set(lines()) == {f"step 1 of the run {run.name} {said}"}
    assert {worker.worker: worker.gathered for worker in run.workers()} == {"waiting": 1, "idle": 0, "late": 0}
    others = [under_way(partial(step, model, each, 1)) for model, each in zip(models[1:], (idle, late), strict=True)]
    for each in (stepping, *others):
        each.result()
    assert waiting.loaded.step == 1
    assert [worker.gathered for worker in run.workers()] == [0, 0, 0]


def status(name: str, gathered: int) -> WorkerStatus:
    return WorkerStatus(worker=name, lease="l", token=1, ttl_ms=1000, expires_in_ms=1000, gathered=gathered)


SYNC, QUORUM = AggregationSpec(policy="sync"), AggregationSpec(policy="quorum", batch=2)


@pytest.mark.parametrize(
    ("aggregation", "workers", "said"),
    [
        (SYNC, [status("a", 1)], []),
        (SYNC, [status("a", 1), status("b\n", 0)], ["step 7 of the run r waits for the pushes of 'b\\n'"]),
        (
            SYNC,
            [status(f"w{number}", 0) for number in range(13)],
            ["step 7 of the run r waits for the pushes of "
             + ", ".join(f"'w{number}'" for number in range(10)) + " and 3 more"],
        ),
        (QUORUM, [status("a", 1), status("b", 1)], []),
        (
            QUORUM,
            [status("a", 1)],
            ["step 7 of the run r waits for 1 more of the 2 pushes that make it; no other worker is live"],
        ),
    ],
)  # fmt: skip
def test_whom_it_names(
    caplog: pytest.LogCaptureFixture, aggregation: AggregationSpec, workers: list[WorkerStatus], said: list[str]
) -> None:
    caplog.set_level(logging.WARNING, "freestep")
    log_update_wait("r", 7, aggregation, lambda: workers)
    assert caplog.messages == said


def test_a_service_that_does_not_answer_does_not_end_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    def away() -> list[WorkerStatus]:
        raise ServiceUnreachable("away")

    caplog.set_level(logging.WARNING, "freestep")
    log_update_wait("r", 7, SYNC, away)
    assert caplog.messages == []
