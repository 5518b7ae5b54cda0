"""A run that was deleted stays deleted, and a new run of its name has nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from freestep.errors import RunNotFound, RunNotInitialized
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.local import LocalStorage
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
    run_async,
    spec_of,
    until,
)


def has_a_shard(run: Run) -> bool:
    """Whether a process has one in a run that is open, as it knows."""
    view = run._ownership.view
    return run.owns_any and view is not None and view.phase == "open"


async def shared_run(one: Registry, other: Registry) -> tuple[Run, Run]:
    """A run of two shards, one of each process, with its weights."""
    run, is_new = await one.create("run", spec_of(2), ANYBODY)
    assert is_new
    theirs = await other.find("run")
    runs = (run, theirs)
    await until(lambda: all(map(has_a_shard, runs)), "a shard for each process")
    zeros, owners = torch.zeros(NUMEL), [run if run.owns(index) else theirs for index in range(2)]
    parts = zip(owners, range(2), strict=True)
    await asyncio.gather(
        *(each.initialize(each.shard(index), part_of(each, index, zeros), "upload") for each, index in parts)
    )
    return runs


@asynccontextmanager
async def two(store: str, *folders: Path) -> AsyncIterator[tuple[Registry, Registry]]:
    """Two processes, each with its own folder."""
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    async with (
        process(store, folders[0], node_url=urls[0], owner_ttl_seconds=2.0) as one,
        process(store, folders[1], node_url=urls[1], owner_ttl_seconds=2.0) as other,
    ):
        yield one, other


def test_what_a_deletion_has_left_is_no_checkpoint_of_the_next_run(store: str, tmp_path: Path) -> None:
    """The process ended after the run file was removed, and before the checkpoints were."""

    async def work() -> None:
        root = tmp_path / "data"
        async with process(store, root) as registry:
            run = await new_run(registry)
            await push(run, claim_of(await lease_of(run), "one"))
            await run.checkpoint()
            kept = {path: path.read_bytes() for path in root.rglob("checkpoints/**/*") if path.is_file()}
            await registry.delete("run")
            for path, content in kept.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            run, _ = await registry.create("run", spec_of(), ANYBODY)
            with pytest.raises(RunNotInitialized):
                await pull(run.shard(0))
            assert await run.list_checkpoints() == []
            await initialize(run)
            assert await pull(run.shard(0)) == (0, 0.0)
            assert [(each.epoch, each.step) for each in await run.list_checkpoints()] == [(run.epoch, 0)]
        assert len(list(root.glob("runs/run/checkpoints/*"))) == 1, "what was left has been dropped"

    run_async(work)


@pytest.mark.parametrize("are_apart", [False, True])
def test_no_other_process_writes_a_deleted_run_anew(store: str, tmp_path: Path, are_apart: bool) -> None:
    """Nor where each has a disk of its own, on which there is no trace of the deletion."""

    async def work() -> None:
        folders = (tmp_path / "one", tmp_path / ("other" if are_apart else "one"))
        async with two(store, *folders) as (one, other):
            _, theirs = await shared_run(one, other)
            await one.delete("run")
            await until(lambda: theirs.is_gone and "run" not in [run.name for run in other.all()], "the other to hear")
            with pytest.raises(RunNotFound):
                await other.find("run")
        for folder in folders:
            assert Checkpoints(LocalStorage(folder), "run", 3).all() == []

    run_async(work)


def test_a_process_that_missed_a_deletion_takes_the_next_run_for_another(store: str, tmp_path: Path) -> None:
    """It has the old run's state in memory and on a disk of its own; the next has the same name and spec."""

    async def work() -> None:
        async with two(store, tmp_path / "one", tmp_path / "other") as (one, other):
            _, theirs = await shared_run(one, other)
            # It is stopped, and hears nothing.
            await theirs._keeper.stop()
            await one.delete("run")
            run, is_new = await one.create("run", spec_of(2), ANYBODY)
            assert is_new
            await theirs._keeper.look()
            assert theirs.is_gone
            await until(lambda: other._runs.get("run") is not theirs, "the old run to be forgotten")
            newer = await other.find("run")
            await until(lambda: has_a_shard(run) and has_a_shard(newer), "the new run to be open")
            assert run.epoch == newer.epoch == 2
            status = await newer.status()
            assert (status.step, status.initialized) == (0, False)

    run_async(work)


def test_a_process_that_finds_redis_behind_a_deleted_run_does_not_begin_it_anew(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with two(store, tmp_path / "one", tmp_path / "other") as (one, other):
            _, theirs = await shared_run(one, other)
            await theirs._keeper.stop()
            await one.delete("run")
            # As a call to Redis says that has come before the heartbeat.
            theirs._recovery.reopen("Redis has lost what its shards have seen")
            await theirs._keeper.look()
            assert theirs.is_gone
            assert not theirs._recovery.must_reopen
            assert await theirs.coordinator.opening.read() is None

    run_async(work)
