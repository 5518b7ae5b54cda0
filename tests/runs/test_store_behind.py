"""A run whose Redis is behind its shards: in an opening that has ended, or before what was said."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from freestep.api.control import ControlRequest
from freestep_service.domain.tokens import ANYBODY
from in_process import (
    claim_of,
    initialize,
    lease_of,
    new_run,
    process,
    pull,
    push,
    run_async,
    spec_of,
    until,
)
from rolled_back import copied, roll_back


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pushes", [0, 2])
@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_a_run_opens_whose_store_goes_back_into_an_opening(
    store: str, tmp_path: Path, shards: int, pushes: int, durability: str
) -> None:
    """Its shards have loaded what was decided on, and the store does not know that any more."""

    async def work() -> None:
        async with process(store, tmp_path / "data", owner_ttl_seconds=1.0) as registry:
            run = await new_run(registry, shards=shards, durability=durability)
            lease = await run.leases.grant("worker", None)
            first = claim_of(lease, "first")
            await push(run, first)
            key = "freestep:{run}:"
            opening = [("HSET", key + "run", "phase", "load")]
            opening += [("HDEL", key + "shards", f"{index}:loaded") for index in range(shards)]
            with Redis.from_url(store) as client:
                older = copied(client)
                for number in range(pushes):
                    await push(run, claim_of(lease, f"after-{number}", 1 + number))
                roll_back(client, older, *opening)
                await until(lambda: client.hget(key + "run", "phase") == b"open", "the end of the opening")
            again = await push(run, first)
            assert {(outcome.replayed, outcome.record.step) for outcome in again} == {(True, 1)}
            assert [await pull(run.shard(index)) for index in range(shards)] == [(1 + pushes, 1.0 + pushes)] * shards

    run_async(work)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_no_opening_is_carried_out_again_that_was_before_another(
    store: str, tmp_path: Path, shards: int, durability: str
) -> None:
    """The store goes back into one that loaded a checkpoint: what its shards have taken since stays."""

    async def work() -> None:
        async with process(store, tmp_path / "data", owner_ttl_seconds=1.0) as registry:
            run = await new_run(registry, shards=shards, durability=durability)
            await run.checkpoint()
            await run.restore(0)
            key = "freestep:{run}:"
            opening = [("HSET", key + "run", "phase", "load")]
            opening += [("HDEL", key + "shards", f"{index}:loaded") for index in range(shards)]
            lease = await run.leases.grant("worker", None)
            with Redis.from_url(store) as client:

                def generation() -> int:
                    return int(client.hget(key + "run", "generation") or 0)

                def is_open() -> bool:
                    return client.hget(key + "run", "phase") == b"open"

                older = copied(client)
                await push(run, claim_of(lease, "first"))
                await run.coordinator.opening.gather(shards)
                await until(is_open, "the second opening")
                await push(run, claim_of(lease, "second", 1))
                # However far the store's clock is behind.
                newest = generation() + 10**9
                for index in range(shards):
                    run.shard(index).core.loaded = newest
                roll_back(client, older, *opening)
                await until(is_open, "the end of the opening")
                assert generation() > newest
            again = await push(run, claim_of(lease, "second", 1))
            assert {(outcome.replayed, outcome.record.step) for outcome in again} == {(True, 2)}
            assert [await pull(run.shard(index)) for index in range(shards)] == [(2, 2.0)] * shards

    run_async(work)


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_there_whose_upload_the_store_has_forgotten(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", owner_ttl_seconds=1.0) as registry:
            run, _ = await registry.create("run", spec_of(shards), ANYBODY)
            with Redis.from_url(store) as client:
                older = copied(client)
                await initialize(run)
                roll_back(client, older)
                await until(lambda: client.hget("freestep:{run}:run", "initialized") == b"1", "the weights")
            claim = claim_of(await lease_of(run), "first")
            assert {outcome.record.step for outcome in await push(run, claim)} == {1}
            assert [await pull(run.shard(index)) for index in range(shards)] == [(1, 1.0)] * shards

    run_async(work)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_redis_that_has_lost_a_change_does_not_say_that_there_is_nothing_to_change(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", owner_ttl_seconds=600.0) as registry:
            run = await new_run(registry, shards=shards)
            lease = await run.leases.grant("worker", None)
            await run.controls.change(ControlRequest(optimizer={"lr": 0.5}), "", "tests")
            await push(run, claim_of(lease, "first"))
            with Redis.from_url(store) as client:
                client.flushall()
            # As an owner does that sees it first. Redis has the run again, as it was created: with this rate.
            await run.coordinator.opening.gather(shards)
            await run.controls.change(ControlRequest(optimizer={"lr": 1.0}), "", "tests")
            lease = await lease_of(run)
            await push(run, claim_of(lease, "second", 1))
            assert [await pull(run.shard(index)) for index in range(shards)] == [(2, 1.5)] * shards

    run_async(work)
