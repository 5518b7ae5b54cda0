"""A run between Redis and its shards, without the web: each test makes the calls that routes make."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from freestep.errors import CoordinatorUnavailable, InvalidSpec, Overloaded, ProblemError, RunExists
from freestep.wire.manifest import Manifest
from freestep_service.domain.records import Origin
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.consistent_reads import Reading
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from freestep_service.state.memory_budget import run_bytes
from in_process import (
    NUMEL,
    claim_of,
    initialize,
    lease_of,
    new_run,
    part_of,
    process,
    pull,
    push,
    resources_of,
    run_async,
    spec_of,
    until,
)


def run_of(groups: dict[str, Any], resources: Resources) -> Run:
    spec = spec_of(groups=groups)
    return Run("run", spec, Manifest.of(spec), 1, resources, Origin(1))


def test_a_run_that_another_process_has_just_created_is_refused_with_what_differs(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with resources_of(store, tmp_path / "data") as resources:
            groups = {"slow": {"lr": 0.5}, "fast": {"lr": 2.0}}
            await run_of(groups, resources).create()
            # The same, though not the same text.
            await run_of(dict(reversed(groups.items())), resources).create()
            with pytest.raises(RunExists, match=r"groups\.fast\.lr is 2\.0, and 3\.0 is wanted") as refused:
                await run_of({**groups, "fast": {"lr": 3.0}}, resources).create()
            assert refused.value.extensions == {
                "run": "run",
                "differences": [{"field": "groups.fast.lr", "wanted": 3.0, "existing": 2.0}],
            }

    run_async(work)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_retry_after_a_reshard_gets_its_receipt(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            lease = await run.leases.grant("worker", None)
            first = await push(run, claim_of(lease, "once"))
            assert {outcome.record.decision for outcome in first} == {"applied"}
            await run.reshard(2)
            again = await push(run, claim_of(lease, "once"))
            assert [(outcome.replayed, outcome.record.step) for outcome in again] == [(True, 1)] * 2
            assert [await pull(run.shard(index)) for index in range(2)] == [(1, 1.0)] * 2

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_update_that_fails_takes_the_run_back_to_its_checkpoint(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "kept"))
            await run.checkpoint()
            broken = run.shard(shards - 1).core.shard
            apply, failed = broken.apply, []

            def fail(entry: Any) -> None:
                if entry.gradient is not None and not failed:
                    failed.append(entry.seq)
                    broken.seq = entry.seq
                    raise RuntimeError("out of memory")
                apply(entry)

            broken.apply = fail  # type: ignore[method-assign]
            with pytest.raises(ProblemError):
                await push(run, claim_of(lease, "lost", 1))
            await until(lambda: run.epoch == 2, "the opening from the checkpoint")
            renewed = await lease_of(run)
            with pytest.raises(ProblemError):
                # Not "applied, replayed": its update is in no weights.
                await push(run, claim_of(lease, "lost", 1))
            assert renewed.step == 1
            outcomes = await push(run, claim_of(renewed, "lost", 1))
            assert {(outcome.record.decision, outcome.replayed) for outcome in outcomes} == {("applied", False)}
            assert [await pull(run.shard(index)) for index in range(shards)] == [(2, 2.0)] * shards

    run_async(work)


def test_reads_of_one_shard_hold_no_push_up(store: str, tmp_path: Path) -> None:
    """Pulls for which only one of two shards is ever asked keep the other's parts for 30 s."""

    async def work() -> None:
        async with process(store, tmp_path / "data", slow_peer_bytes=0, queue_seconds=1.0) as registry:
            run = await new_run(registry, shards=2)
            lease = await run.leases.grant("worker", None)
            for number in range(4):
                try:
                    async with run.shard(0).read(Reading("y", "F32", ticket=f"pull-{number}", readers=2)):
                        pass
                except ProblemError:
                    # The third finds no room for pulls.
                    assert number >= 2
            for number in range(20):
                outcomes = await push(run, claim_of(lease, str(number), number), answer="F32")
                for outcome, shard in zip(outcomes, (run.shard(0), run.shard(1)), strict=True):
                    async with shard.read(outcome.reading) as body:
                        assert body.step == number + 1

    run_async(work, 30)


def test_a_redis_that_is_wiped_under_pushes_loses_none(store: str, tmp_path: Path) -> None:
    """A commit that hears it has the run opened again, which closes no task that waits for that."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=2)
            for number in range(6):
                lease = await run.leases.grant("worker", None)
                gate = asyncio.Event()
                pushing = asyncio.create_task(push(run, claim_of(lease, str(number), number), gate=gate))
                await asyncio.sleep(0.01)
                if number % 2:
                    with Redis.from_url(store) as client:
                        client.flushall()
                gate.set()
                try:
                    await pushing
                except ProblemError:
                    while True:
                        try:
                            lease = await run.leases.grant("worker", None)
                            await push(run, claim_of(lease, str(number), lease.step))
                            break
                        except ProblemError:
                            await asyncio.sleep(0.05)
            assert [await pull(run.shard(index)) for index in range(2)] == [(6, 6.0)] * 2
            assert run.epoch == 1

    run_async(work)


def test_a_call_that_is_behind_an_opening_under_way_asks_for_no_other(store: str, tmp_path: Path) -> None:
    """A run that goes back to a checkpoint is, for a moment, behind what its shards have seen."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=2)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            await run.checkpoint()
            for number in range(2, 6):
                await push(run, claim_of(lease, str(number), number - 1))
            restoring = asyncio.create_task(run.restore(1))
            while not restoring.done():
                try:
                    await push(run, claim_of(lease, "late", 1))
                except ProblemError:
                    await asyncio.sleep(0)
            await restoring
            await run.refresh()
            assert (run.epoch, (await run.status()).step) == (2, 1)

    run_async(work)


def test_a_lost_entry_has_the_run_opened_again(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=2)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            await run.checkpoint()
            with Redis.from_url(store) as client:
                # As one that was trimmed before an owner heard of it.
                run.shard(0).on_entry = lambda entry: True  # type: ignore[method-assign]
                pushing = asyncio.create_task(push(run, claim_of(lease, "two", 1)))
                await until(lambda: int(client.hget("freestep:{run}:run", "step") or 0) == 2, "the commit")
                client.xtrim("freestep:{run}:log", maxlen=0)
            with pytest.raises(ProblemError):
                await pushing
            await until(lambda: run.epoch == 2, "the opening")

    run_async(work)


def test_an_update_that_takes_long_is_no_fault_of_redis(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", commit_seconds=0.05) as registry:
            run = await new_run(registry)
            lease = await run.leases.grant("worker", None)
            core, may_go_on = run.shard(0).core, threading.Event()
            apply = core.shard.apply

            def slow(entry: Any) -> None:
                assert may_go_on.wait(30)
                apply(entry)

            core.shard.apply = slow  # type: ignore[method-assign]
            pushing = asyncio.create_task(push(run, claim_of(lease, "one")))
            await until(lambda: core.writer.position.seq == 1, "the commit")
            await asyncio.sleep(0.2)
            assert not pushing.done()
            may_go_on.set()
            assert [outcome.record.decision for outcome in await pushing] == ["applied"]

    run_async(work)


def test_two_requests_of_one_upload_begin_the_run_once(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", commit_seconds=30) as registry:
            run, _ = await registry.create("run", spec_of(2), ANYBODY)
            shards, gate = [run.shard(0), run.shard(1)], asyncio.Event()
            twice = [
                asyncio.create_task(shard.initialize(part_of(run, shard.index, torch.zeros(NUMEL), gate), "upload"))
                for shard in shards
                for _ in range(2)
            ]
            began, initialize_shard = [], shards[0].core.shard.initialize
            shards[0].core.shard.initialize = lambda *args: (  # type: ignore[method-assign]
                began.append(1),
                initialize_shard(*args),
            )
            await asyncio.sleep(0.05)
            gate.set()
            await asyncio.gather(*twice)
            assert began == [1]
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            assert [await pull(shard) for shard in shards] == [(1, 1.0)] * 2

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_upload_whose_answer_is_lost_has_its_weights(store: str, tmp_path: Path, shards: int) -> None:
    """Redis has the run initialized by it: whether that counts must not stay unknown."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, _ = await registry.create("run", spec_of(shards), ANYBODY)
            ask, lost = run.coordinator.opening.initial_weights, []

            async def losing(owner: Any, *arguments: Any) -> str:
                status = await ask(owner, *arguments)
                if status == "initialized" and not lost:
                    lost.append(owner.shard)
                    raise CoordinatorUnavailable("the answer was lost")
                return status

            run.coordinator.opening.initial_weights = losing  # type: ignore[method-assign]
            await initialize(run)
            assert len(lost) == 1
            assert [await pull(run.shard(index)) for index in range(shards)] == [(0, 0.0)] * shards

    run_async(work)


@pytest.mark.parametrize("what", ["push", "upload", "whole", "read"])
def test_no_wait_for_memory_is_longer_than_queue_seconds(store: str, tmp_path: Path, what: str) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", queue_seconds=0.05, slow_bytes_per_second=1e-6) as registry:
            run, _ = await registry.create("run", spec_of(), ANYBODY)
            if what != "upload":
                await initialize(run)
            core = run.shard(0).core
            pools = {"push": core.staging.pool, "upload": core.staging.pool, "whole": run.whole_bodies.pool}
            pool = pools.get(what, core.snapshots.pool)
            taken = [pool.try_acquire() for _ in range(pool.capacity)]
            zeros = part_of(run, 0, torch.zeros(NUMEL))

            async def whole() -> None:
                async with run.whole_bodies.staged(zeros):
                    pass

            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "push": lambda: push(run, claim_of(lease, "one")),
                "upload": lambda: run.shard(0).initialize(zeros, "upload"),
                "whole": whole,
                "read": lambda: pull(run.shard(0)),
            }
            lease = await run.leases.grant("worker", None)
            with pytest.raises(Overloaded):
                await calls[what]()
            for vector in taken:
                assert vector is not None
                pool.release(vector)
            if what == "upload":
                await initialize(run)
            await push(run, claim_of(lease, "two"))

    run_async(work)


def test_a_checkpoint_of_a_run_that_redis_has_lost_is_written(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=2)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            with Redis.from_url(store) as client:
                client.flushall()
            assert (await run.checkpoint()).step == 1
            assert run.epoch == 1

    run_async(work)


def test_a_run_that_is_too_large_for_the_memory_is_refused_with_the_figures(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", memory_bytes=run_bytes(spec_of(), 1, 1) * 3 // 2) as registry:
            await new_run(registry)
            with pytest.raises(InvalidSpec, match=r"the run needs up to .* of memory, and .* are free") as refusal:
                await registry.create("other", spec_of(), ANYBODY)
            figures = refusal.value.extensions
            assert figures["needed_bytes"] > figures["free_bytes"] > 0
            assert [run.name for run in registry.all()] == ["run"]
            with Redis.from_url(store) as client:
                assert not client.keys("freestep:{other}:*")
            await registry.delete("run")
            await new_run(registry, "other")

    run_async(work)
