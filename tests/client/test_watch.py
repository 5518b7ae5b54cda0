"""New points as an evaluator watches for them: each once, over rollbacks, outages and shards, and without a lease."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import httpx
import pytest
import torch

from freestep import Client, HeldLease, Run, RunNotFound
from freestep.bulk import BulkTransport
from harness import ProcessService, ThreadService
from meanwhile import under_way, wait_until

ONES = {"w": torch.ones(4)}
SPEC: dict[str, Any] = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": "w", "shape": [4]}],
}
"""Of a run whose every weight is its step, negated."""


def begin(run: Run, **members: Any) -> None:
    run.create({**SPEC, **members})
    run.initialize({"w": torch.zeros(4)})


def push(run: Run, lease: HeldLease, steps: int = 1) -> None:
    for _ in range(steps):
        assert run.push(ONES, lease.claim(run.status().step)).decision == "applied"


@pytest.fixture
def asked() -> list[httpx.Response]:
    """The answers to pulls, in order."""
    return []


@pytest.fixture
def watched(service: ThreadService, name: str, asked: list[httpx.Response]) -> Iterator[Run]:
    """The run, as a reader asks for it whose requests are noted."""

    def note(response: httpx.Response) -> None:
        if response.request.url.path.endswith("/parameters"):
            asked.append(response)

    http = httpx.Client(base_url=service.url, transport=BulkTransport(), event_hooks={"response": [note]})
    with Client(http=http) as client:
        yield client.run(name)


def test_new_points_come_once_each(run: Run, watched: Run, asked: list[httpx.Response]) -> None:
    begin(run)
    points = watched.watch("x")
    with run.lease() as lease:
        for step in range(4):
            seen, x = next(points)
            assert (seen, x.step, x.epoch, x.point, x.run) == (step, step, 1, "x", run.name)
            assert torch.equal(x["w"], torch.full((4,), -float(step)))
            push(run, lease)
    assert [answer.status_code for answer in asked] == [200] * 4


def test_what_was_yielded_stays_as_it_was(run: Run) -> None:
    begin(run)
    kept = []
    with run.lease() as lease:
        for _, x in islice(run.watch(dtype="BF16"), 3):
            kept.append(x)
            push(run, lease)
    assert [float(x["w"][0]) for x in kept] == [0.0, -1.0, -2.0]
    assert {x["w"].dtype for x in kept} == {torch.bfloat16}


def test_a_snapshot_is_copied_with_where_it_is_from(run: Run) -> None:
    begin(run)
    x, _ = run.pull("z")
    for other in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert (type(other), other.run, other.point, other.epoch, other.step) == (type(x), run.name, "z", 1, 0)
        assert torch.equal(other["w"], x["w"])
    assert x.metadata()["freestep.point"] == "z"


def test_a_point_is_waited_for(run: Run, watched: Run, asked: list[httpx.Response]) -> None:
    begin(run)
    points = watched.watch("y")
    assert next(points)[0] == 0
    coming = under_way(lambda: next(points))
    # The first request after a point does not wait, the second does.
    wait_until(lambda: len(asked) == 2)
    with run.lease() as lease:
        push(run, lease)
    step, y = coming.result()
    assert (step, y.point) == (1, "y")
    assert [answer.status_code for answer in asked] == [200, 504, 200]
    assert "wait=" in asked[2].request.headers["prefer"]


def test_every_is_the_fewest_steps_between_points(run: Run) -> None:
    begin(run)
    points = run.watch(every=3, min_step=2)
    with run.lease() as lease:
        push(run, lease, 2)
        assert next(points)[0] == 2
        coming = under_way(lambda: next(points))
        push(run, lease, 3)
        assert coming.result()[0] == 5
        push(run, lease, 4)
        assert next(points)[0] == 9
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"from 1, not {wrong}"):
            run.watch(every=wrong)


def test_a_run_that_goes_back_while_it_is_watched_yields_its_new_point(
    run: Run, watched: Run, asked: list[httpx.Response]
) -> None:
    begin(run)
    with run.lease() as lease:
        push(run, lease, 2)
        run.checkpoint()
        push(run, lease, 2)
    points = watched.watch("x", every=100)
    assert next(points)[0] == 4
    coming = under_way(lambda: next(points))
    wait_until(lambda: len(asked) == 2)
    run.restore(2)
    step, x = coming.result()
    assert (step, x.epoch, float(x["w"][0])) == (2, 2, -2.0)


def test_a_run_that_went_back_unseen_yields_its_new_point_at_once(
    run: Run, watched: Run, asked: list[httpx.Response]
) -> None:
    begin(run)
    with run.lease() as lease:
        push(run, lease, 2)
        run.checkpoint()
        push(run, lease, 2)
    points = watched.watch("x")
    assert next(points)[0] == 4
    run.restore(2)
    with run.lease() as lease:
        # Another x of step 4.
        for _ in range(2):
            run.push({"w": torch.zeros(4)}, lease.claim(run.status().step))
    step, x = next(points)
    assert (step, x.epoch, float(x["w"][0])) == (4, 2, -2.0)
    assert not any("wait=" in answer.request.headers.get("prefer", "") for answer in asked)
    with run.lease() as lease:
        push(run, lease)
    assert next(points)[0] == 5


def test_a_run_that_is_deleted_ends_it(run: Run, watched: Run, asked: list[httpx.Response]) -> None:
    begin(run)
    points = watched.watch()
    next(points)
    coming = under_way(lambda: next(points))
    wait_until(lambda: len(asked) == 2)
    run.delete()
    with pytest.raises(RunNotFound):
        coming.result()
    with pytest.raises(RunNotFound):
        next(run.watch())


def test_a_run_without_weights_is_waited_for(run: Run, watched: Run, asked: list[httpx.Response]) -> None:
    run.create(SPEC)
    coming = under_way(lambda: next(watched.watch()))
    wait_until(lambda: bool(asked))
    run.initialize(ONES)
    step, x = coming.result()
    assert (step, float(x["w"][0])) == (0, 1.0)
    assert asked[0].status_code == 409


def test_a_reader_does_not_hold_up_workers_that_wait_for_each_other(run: Run) -> None:
    begin(run, aggregation={"policy": "sync"})
    points = run.watch()
    assert next(points)[0] == 0
    coming = under_way(lambda: next(points))
    with run.lease("alone") as lease:
        assert [worker.worker for worker in run.workers()] == ["alone"]
        push(run, lease)
    assert coming.result()[0] == 1


@pytest.mark.parametrize("dtype", ["F32", "I8"])
def test_a_run_of_several_shards_is_watched(
    shared_nodes: Callable[..., list[ThreadService]], name: str, dtype: str
) -> None:
    with Client(shared_nodes(2)[0].url) as client:
        run = client.run(name)
        begin(run, shards=2)
        points = run.watch(dtype=dtype)
        with run.lease() as lease:
            push(run, lease, 2)
            run.checkpoint()
            push(run, lease, 2)
            step, x = next(points)
            torch.testing.assert_close((step, x["w"]), (4, torch.full((4,), -4.0)))
            coming = under_way(lambda: next(points))
            run.restore(2)
            step, x = coming.result()
            torch.testing.assert_close((step, x.epoch, x["w"]), (2, run.status().epoch, torch.full((4,), -2.0)))


@pytest.mark.slow
def test_a_service_that_is_killed_and_comes_back_is_watched_on(
    start_process: Callable[..., ProcessService], name: str
) -> None:
    service = start_process()
    with Client(service.url, retry_for=100.0) as client:
        run = client.run(name)
        begin(run)
        with run.lease() as lease:
            push(run, lease)
        run.checkpoint()
        points = run.watch()
        assert next(points)[0] == 1
        coming = under_way(lambda: next(points))
        service.kill()
        service.start()
        with run.lease() as lease:
            push(run, lease)
        step, x = coming.result()
        assert (step, float(x["w"][0])) in ((1, -1.0), (2, -2.0))
        assert step == 2 or next(points)[0] == 2


def test_another_run_of_the_name_ends_it(run: Run, watched: Run) -> None:
    begin(run)
    points = watched.watch()
    next(points)
    run.delete()
    begin(run)
    with pytest.raises(RunNotFound, match="another run has its name"):
        next(points)
