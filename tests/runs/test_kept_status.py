"""What a run's status counts outlives restarts, and a Redis that loses its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from freestep_service.domain.records import CheckpointId
from harness import ProcessService, ThreadService
from in_process import claim_of, lease_of, new_run, process, push, run_async
from plain_calls import SGD, Api
from rolled_back import copied, roll_back
from runs.journaled import crashed, opened

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


def test_pushes_are_counted_as_of_the_state_that_is_written(store: str, tmp_path: Path) -> None:
    """Those that come while a checkpoint is written are in the journal behind it, and count once."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, durability="journal")
            lease, shard = await lease_of(run), run.shard(0)
            await push(run, claim_of(lease, "before"))
            copy = await shard.core.writer.run(shard.core.shard.copy_state)
            await push(run, claim_of(lease, "meanwhile", 1))
            await run._checkpointing.write(shard, copy)
            await run._checkpointing.complete(CheckpointId(copy.epoch, copy.step, copy.seq))
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                status = await again.status()
                assert (status.step, status.pushes["applied"]) == (2, 2)

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("loss", ["wiped", "rolled back"])
def test_shards_know_what_has_counted_where_redis_does_not(store: str, tmp_path: Path, shards: int, loss: str) -> None:
    async def work() -> None:
        # No heartbeat hears of what Redis has counted.
        async with process(store, tmp_path / "data", owner_ttl_seconds=600.0) as registry:
            run = await new_run(registry, shards=shards, aggregation={"policy": "buffered", "batch": 2})
            lease = await lease_of(run)
            with Redis.from_url(store) as client:
                older = copied(client) if loss == "rolled back" else {}
                for number in range(3):
                    await push(run, claim_of(lease, f"key-{number}"))
                roll_back(client, older)
            await push(run, claim_of(lease, "key-2"))
            assert (await run.status()).pushes == {"applied": 1, "accumulated": 2, "dropped": 0}
            # Of a state that is given up, too.
            await run.checkpoint()
            await run.restore(0)
            assert (await run.status()).pushes == {"applied": 1, "accumulated": 2, "dropped": 0}

    run_async(work)
