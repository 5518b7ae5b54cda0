"""What a run's status counts outlives restarts, and a Redis that loses its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from harness import ProcessService, ThreadService
from in_process import claim_of, lease_of, new_run, process, push, run_async
from plain_calls import SGD, Api

KEPT = ("step", "pushes", "loss", "staleness", "checkpoint_step", "scheduled_lr", "metrics")


def kept(api: Api) -> dict[str, Any]:
    status = api.status()
    return {name: status[name] for name in KEPT}


def pushed(api: Api, begin: int = 0) -> None:
    """Three pushes, one of which is dropped."""
    lease = api.lease()
    for step, taken_at in ((begin, begin), (begin + 1, begin + 1), (begin + 2, 0)):
        api.push(lease, taken_at, Freestep_Loss=str(1.0 + step))


def created(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "async", "max_staleness": 1})
    pushed(api)
    api.http.post(api.path("/metrics"), json={"name": "accuracy", "value": 0.5, "step": 1})


def test_an_orderly_restart_keeps_the_status(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url)
    created(api)
    before = kept(api)
    assert before["pushes"] == {"applied": 2, "accumulated": 0, "dropped": 1}
    assert before["loss"] == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    for _ in range(2):
        service.stop()
        service = start_service()
        api = connect(service.url, api.run)
        # It was written at the end.
        assert kept(api) == {**before, "checkpoint_step": 2}
    assert 'freestep_loss{run="' in api.http.get("/metrics").text
    pushed(api, 2)
    assert api.status()["pushes"] == {"applied": 4, "accumulated": 0, "dropped": 2}
    assert api.status()["loss"] == pytest.approx(0.9 * (0.9 * before["loss"] + 0.1 * 3.0) + 0.1 * 4.0)


@pytest.mark.slow
def test_after_a_kill_the_status_is_that_of_the_checkpoint(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url)
    created(api)
    api.http.post(api.path("/checkpoints"))
    before = kept(api)
    pushed(api, 2)
    service.kill()
    service.start()
    assert kept(api) == before


@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_kept_by_runs_of_several_shards_and_where_redis_has_lost_it(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        expected = {"applied": 2, "accumulated": 0, "dropped": 1}
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, aggregation={"policy": "async", "max_staleness": 1})
            lease = await lease_of(run)
            for step, taken_at in enumerate((0, 1, 0)):
                await push(run, claim_of(lease, f"key-{step}", taken_at))
            before = await run.status()
            assert before.pushes == expected
            # A heartbeat hears of them.
            await run.refresh()
            with Redis.from_url(store) as client:
                client.flushall()
            await push(run, claim_of(lease, "key-2"))
            status = await run.status()
            assert (status.pushes, status.staleness, status.epoch) == (expected, before.staleness, 1)
        with Redis.from_url(store) as client:
            client.flushall()
        async with process(store, tmp_path / "data") as registry:
            run = await registry.find("run")
            await lease_of(run)
            status = await run.status()
            assert (status.pushes, status.staleness, status.epoch) == (expected, before.staleness, 1)
            assert status.checkpoint_step == 2

    run_async(work)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_durable_is_known_where_redis_has_lost_it(
    store: str, tmp_path: Path, shards: int, durability: str
) -> None:
    """With a journal, all that is applied is; without, what a checkpoint has."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability=durability)
            lease = await lease_of(run)
            await push(run, claim_of(lease, "first", 0))
            await run.checkpoint()
            await push(run, claim_of(lease, "second", 1))
            with Redis.from_url(store) as client:
                client.flushall()
            # Its shards hold more than their newest checkpoint has.
            await push(run, claim_of(lease, "second", 1))
            expected = 2 if durability == "journal" else 1
            assert [shard.durable_step for shard in (await run.topology()).shards] == [expected] * shards
        with Redis.from_url(store) as client:
            client.flushall()
        async with process(store, tmp_path / "data") as registry:
            run = await registry.find("run")
            await lease_of(run)
            assert [shard.durable_step for shard in (await run.topology()).shards] == [2] * shards

    run_async(work)
