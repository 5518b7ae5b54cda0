"""What a run counts of the memory budget, and what it has: through changes of its policy, both ways, and restarts."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep.api.control import ControlRequest
from freestep.api.models import RunSpec
from freestep.errors import InvalidSpec
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.state.buffers import Vector
from freestep_service.state.memory_budget import run_bytes
from in_process import (
    NUMEL,
    claim_of,
    initialize,
    lease_of,
    new_run,
    part_of,
    process,
    push,
    run_async,
    spec_of,
    until,
    until_shared,
)

POLICIES: dict[str, dict[str, Any]] = {
    "async": {"policy": "async"},
    "sync": {"policy": "sync"},
    "buffered": {"policy": "buffered", "batch": 3},
    "clip": {"policy": "quorum", "batch": 2, "robust": "clip"},
}
BODIES = {"async": 2, "sync": 4, "buffered": 3, "clip": 2}
"""How many bodies are received at once under a policy."""
WIDEST = "sync"


def spec(policy: str, shards: int = 1) -> RunSpec:
    return spec_of(shards, aggregation=POLICIES[policy])


def needed(policy: str, shards: int = 1) -> int:
    """What a run takes that is created under a policy."""
    return run_bytes(spec(policy, shards), shards, shards)


def counted(registry: Registry, name: str = "run") -> int:
    return registry._resources.memory._named[name]


def take_all(run: Run) -> list[Vector]:
    """All vectors for bodies that there are."""
    pool, taken = run.shard(0).core.staging.pool, list[Vector]()
    while (vector := pool.try_acquire()) is not None:
        taken.append(vector)
    return taken


def give_back(run: Run, taken: list[Vector]) -> None:
    while taken:
        run.shard(0).core.staging.pool.release(taken.pop())


def has_gathered(run: Run) -> bool:
    """Whether there is a vector that pushes are gathered in."""
    return run.shard(0).core.shard._accumulated is not None


async def change(run: Run, policy: str) -> None:
    base = {"robust": "none", "batch": None}
    await run.controls.change(ControlRequest(aggregation={**base, **POLICIES[policy]}), "", "me")


async def is_counted(registry: Registry, size: int) -> None:
    await until(lambda: counted(registry) == size, f"{counted(registry)} where {size} are held")


@asynccontextmanager
async def one_run(store: str, data: Path, policy: str, **settings: Any) -> AsyncIterator[tuple[Registry, Run]]:
    async with process(store, data, **settings) as registry:
        run, _ = await registry.create("run", spec(policy), ANYBODY)
        await initialize(run)
        assert counted(registry) == needed(policy)
        yield registry, run


@pytest.mark.parametrize(
    ("before", "after", "durability"),
    [*((*pair, "checkpoint") for pair in itertools.combinations(POLICIES, 2)), ("buffered", "async", "journal")],
)
def test_a_run_counts_what_it_has_through_a_change_and_back_and_a_restart(
    store: str, tmp_path: Path, before: str, after: str, durability: str
) -> None:
    keys = map(str, itertools.count())

    async def require_all(registry: Registry, run: Run, policy: str) -> None:
        """It is as one that was created so, and has no more when it has all that it may have."""
        await is_counted(registry, needed(policy))
        lease = await lease_of(run)
        for _ in range(4):
            await push(run, claim_of(lease, next(keys), (await run.status()).step))
        taken = take_all(run)
        assert len(taken) == BODIES[policy]
        assert not has_gathered(run) or policy != "async"
        give_back(run, taken)
        assert counted(registry) == needed(policy)

    async def work() -> None:
        data = tmp_path / "data"
        async with process(store, data) as registry:
            run = await new_run(registry, aggregation=POLICIES[before], durability=durability)
            await require_all(registry, run, before)
            await change(run, after)
            await require_all(registry, run, after)
        async with process(store, data) as registry:
            run = registry.get("run")
            await require_all(registry, run, after)
            await change(run, before)
            await require_all(registry, run, before)
        async with process(store, data) as registry:
            await require_all(registry, registry.get("run"), before)

    run_async(work)


def test_what_is_too_much_is_counted_until_it_has_been_given_back(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with one_run(store, tmp_path / "data", "sync") as (registry, run):
            taken = take_all(run)
            assert len(taken) == BODIES["sync"]
            await change(run, "async")
            vector = 4 * run.manifest.numel
            # The four bodies are still there.
            await is_counted(registry, needed("async") + 2 * vector)
            run.shard(0).core.staging.pool.release(taken.pop())
            assert counted(registry) == needed("async") + 2 * vector
            run.shard(0).core.staging.pool.release(taken.pop())
            await is_counted(registry, needed("async"))
            assert not take_all(run)
            give_back(run, taken)
            taken = take_all(run)
            assert len(taken) == BODIES["async"]
            await change(run, "sync")
            taken += take_all(run)
            assert len(taken) == BODIES["sync"]
            assert counted(registry) == needed("sync")
            give_back(run, taken)

    run_async(work)


def test_what_was_gathered_is_counted_until_a_paused_run_makes_its_update(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with one_run(store, tmp_path / "data", "buffered") as (registry, run):
            await push(run, claim_of(await lease_of(run), "one"))
            await run.controls.change(ControlRequest(aggregation=POLICIES["async"], paused=True), "", "me")
            # The vector, and its part of a copy of the state.
            await is_counted(registry, needed("async") + 2 * 4 * run.manifest.numel)
            assert has_gathered(run)
            await run.controls.change(ControlRequest(paused=False), "", "me")
            await is_counted(registry, needed("async"))
            assert not has_gathered(run) and (await run.status()).step == 1

    run_async(work)


@pytest.mark.parametrize("before", [policy for policy in POLICIES if needed(policy) < needed(WIDEST)])
@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_a_change_for_which_there_is_no_memory_is_refused_and_changes_nothing(
    store: str, tmp_path: Path, before: str, durability: str
) -> None:
    async def work() -> None:
        total = needed(WIDEST) - 1
        async with process(store, tmp_path / "data", memory_bytes=total) as registry:
            run = await new_run(registry, aggregation=POLICIES[before], durability=durability)
            status = await run.status()
            for _ in range(2):
                with pytest.raises(InvalidSpec, match=r"the run needs up to .* of memory, and .* are free") as refusal:
                    await change(run, WIDEST)
                figures = refusal.value.extensions
                assert (figures["needed_bytes"], figures["free_bytes"]) == (needed(WIDEST), total)
                assert counted(registry) == needed(before)
                taken = take_all(run)
                assert len(taken) == BODIES[before]
                give_back(run, taken)
            assert await run.status() == status
            # What takes no more is changed all the same.
            await run.controls.change(ControlRequest(optimizer={"lr": 0.5}), "", "me")
            registry._resources.memory.total += 1
            await change(run, WIDEST)
            await is_counted(registry, needed(WIDEST))

    run_async(work)


def test_changes_at_once_leave_what_the_last_one_takes(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with one_run(store, tmp_path / "data", "async") as (registry, run):
            for _ in range(5):
                await asyncio.gather(*(change(run, policy) for policy in POLICIES))
                policy = (await run.status()).control.aggregation.get("policy", "async")
                (last,) = [name for name, each in POLICIES.items() if each["policy"] == policy]
                await is_counted(registry, needed(last))
                taken = take_all(run)
                assert len(taken) == BODIES[last]
                give_back(run, taken)

    run_async(work)


def test_a_run_for_which_there_is_too_little_memory_opens_and_is_counted(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        data, total = tmp_path / "data", needed("async") + needed("sync") // 2
        async with one_run(store, data, "async") as (_, run):
            await change(run, "sync")
            assert (await run.checkpoint()).step == 0
        async with process(store, data, memory_bytes=total) as registry:
            await is_counted(registry, needed("sync"))
            # So nothing takes what it has.
            with pytest.raises(InvalidSpec) as refusal:
                await registry.create("other", spec("async"), ANYBODY)
            assert refusal.value.extensions["free_bytes"] == total - needed("sync")
        with caplog.at_level(logging.ERROR, "freestep"):
            async with process(store, data, memory_bytes=needed("async")) as registry:
                await is_counted(registry, needed("sync"))
                run = registry.get("run")
                await push(run, claim_of(await lease_of(run), "one"))
                with pytest.raises(InvalidSpec) as refusal:
                    await registry.create("other", spec("async"), ANYBODY)
                assert refusal.value.extensions["free_bytes"] == 0
                # It may go on with what it has, and with less.
                await run.controls.change(ControlRequest(optimizer={"lr": 0.5}), "", "me")
                await change(run, "async")
                await is_counted(registry, needed("async"))
                await registry.delete("run")
                assert registry._resources.memory.free == needed("async")
        lacking = needed("sync") - needed("async")
        (line,) = [record.message for record in caplog.records if "memory_bytes" in record.message]
        assert line == (
            f"run run takes up to {needed('sync')} bytes of memory: with the others, {lacking} more than memory_bytes "
            "allows"
        )

    run_async(work)


def test_other_processes_count_a_change_and_what_they_take_over(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        data = tmp_path / "data"
        whole = spec("async", 2), spec("buffered", 2)
        halves, both = ([run_bytes(each, here, 2) for each in whole] for here in (1, 2))
        async with process(store, data, node_url="http://127.0.0.1:1", owner_ttl_seconds=1.0) as registry:
            async with process(store, data, node_url="http://127.0.0.1:2", owner_ttl_seconds=1.0) as other:
                one, _ = await registry.create("run", whole[0], ANYBODY)
                two = await other.find("run")
                await until_shared(one, two)
                await lease_of(one)
                await until(lambda: counted(registry) == counted(other) == halves[0], "each counts its half")
                zeros = torch.zeros(NUMEL)
                await asyncio.gather(
                    *(
                        run.shard(index).initialize(part_of(run, index, zeros), "upload")
                        for run in (one, two)
                        for index in range(2)
                        if run.owns(index)
                    )
                )
                await change(two, "buffered")
                await until(lambda: counted(registry) == counted(other) == halves[1], "each counts the change")
            await until(lambda: one.owns(0) and one.owns(1), "the other's shard")
            await until(lambda: counted(registry) == both[1], "all of it is here")

    run_async(work)
