"""A run that was deleted stays deleted, and a new run of its name has nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from freestep.errors import CoordinatorUnavailable, RunNotFound, RunNotInitialized, StorageUnavailable
from freestep_service.coordination.run_scripts import DELETED_KEY, RUNS_KEY
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.run_files import LastEpochs
from in_process import (
    NUMEL,
    Medium,
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
from meanwhile import wait_for
from proxies import Delay


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


# Deletions that are cut short


@pytest.fixture
def delay(store: str, tmp_path: Path) -> Iterator[Delay]:
    made = Delay(Path(store.removeprefix("unix://")), tmp_path / "delay.sock")
    yield made
    made.close()


def files_of_run(folder: Path) -> list[str]:
    """What there is of the run in storage and in journals."""
    places = ("runs/run", "histories/run*", "journal/run")
    return [str(path) for place in places for path in folder.glob(place)]


async def trained(registry: Registry, **members: Any) -> Run:
    """A run with a push and a checkpoint of it."""
    run = await new_run(registry, **members)
    await push(run, claim_of(await lease_of(run), "one"))
    await run.checkpoint()
    await run._context.history.save()
    return run


@pytest.mark.parametrize("ends", ["Redis's answer is lost", "the call is given up"])
def test_a_deletion_that_redis_has_carried_out_is_carried_through(
    store: str, tmp_path: Path, delay: Delay, ends: str
) -> None:
    """Whoever has asked for it does not know."""

    async def work() -> None:
        async with process(f"unix://{tmp_path / 'delay.sock'}", tmp_path / "data", owner_ttl_seconds=2.0) as registry:
            # So that Redis has the script.
            await new_run(registry, "before")
            await registry.delete("before")
            run = await trained(registry, durability="journal")
            assert len(files_of_run(tmp_path / "data")) == 3
            if ends == "Redis's answer is lost":
                delay.lose(b"{run}:deleted")
                with pytest.raises(CoordinatorUnavailable):
                    await registry.delete("run")
            else:
                answered, released = delay.hold(b"{run}:deleted")
                deletion = asyncio.create_task(registry.delete("run"))
                await asyncio.to_thread(wait_for, answered, "Redis to answer")
                deletion.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await deletion
                released.set()
            await until(lambda: run not in registry._runs.values(), "the run to be ended")
            assert files_of_run(tmp_path / "data") == []
            assert LastEpochs(LocalStorage(tmp_path / "data")).read("run") == 1
            with Redis.from_url(store, decode_responses=True) as client:
                assert (client.hget(DELETED_KEY, "run"), client.smembers(RUNS_KEY)) == ("1", set())
                # As long as calls are under way that began before.
                assert 0 < client.ttl("freestep:{run}:deleted") <= 3600
                # What is noted in storage outlives Redis's data.
                client.flushall()
            assert (await new_run(registry)).epoch == 2

    run_async(work)


def test_all_processes_of_a_run_hear_of_a_deletion_whose_answer_was_lost(
    store: str, tmp_path: Path, delay: Delay
) -> None:
    async def work() -> None:
        folders = (tmp_path / "one", tmp_path / "other")
        async with (
            process(
                f"unix://{tmp_path / 'delay.sock'}", folders[0], node_url="http://127.0.0.1:1", owner_ttl_seconds=2.0
            ) as one,
            process(store, folders[1], node_url="http://127.0.0.1:2", owner_ttl_seconds=2.0) as other,
        ):
            await new_run(other, "before")
            await other.delete("before")
            runs = await shared_run(one, other)
            await until(lambda: all(files_of_run(folder) for folder in folders), "both to have files of it")
            delay.lose(b"{run}:deleted")
            with pytest.raises(CoordinatorUnavailable):
                await one.delete("run")
            await until(
                lambda: not {*one._runs.values(), *other._runs.values()} & {*runs}, "both processes to end the run"
            )
            assert [files_of_run(folder) for folder in folders] == [[], []]
            assert [LastEpochs(LocalStorage(folder)).read("run") for folder in folders] == [1, 1]

    run_async(work)


@pytest.mark.parametrize("are_apart", [False, True])
@pytest.mark.parametrize("whose", ["its successor", "another"])
def test_a_process_that_ends_once_redis_has_deleted_a_run_leaves_the_rest_to_others(
    store: str, tmp_path: Path, are_apart: bool, whose: str
) -> None:
    async def work() -> None:
        folders = (tmp_path / "one", tmp_path / ("other" if are_apart else "one"))
        async with process(store, folders[0], node_url="http://127.0.0.1:1", owner_ttl_seconds=2.0) as one:
            run = await trained(one)
            if whose == "another":
                async with process(store, folders[1], node_url="http://127.0.0.1:2", owner_ttl_seconds=2.0) as other:
                    theirs = await other.find("run")
                    await run._keeper.stop()
                    await run.coordinator.opening.delete(run.epoch)
                    await until(lambda: theirs not in other._runs.values(), "the other to end the run")
                    with pytest.raises(RunNotFound):
                        await other.find("run")
            else:
                await run._keeper.stop()
                await run.coordinator.opening.delete(run.epoch)
            # It is killed: nothing more is written.
            one._runs.clear()
        with Redis.from_url(store, decode_responses=True) as client:
            assert client.hget(DELETED_KEY, "run") == (None if whose == "its successor" else "1")
        async with process(store, folders[0], node_url="http://127.0.0.1:1", owner_ttl_seconds=2.0) as one:
            await until(lambda: not one._runs, "the run to be ended")
            assert files_of_run(folders[0]) == []
            assert (await new_run(one)).epoch == 2

    run_async(work)


@pytest.mark.parametrize("kept", ["deleted/", "run.json", "checkpoints/"])
def test_what_storage_keeps_of_a_deleted_run_is_removed_when_it_can_be(
    store: str, tmp_path: Path, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The note cannot be written, or a file not be removed."""

    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium, owner_ttl_seconds=1.0) as registry:
            run = await trained(registry)
            medium.keeps = kept
            with pytest.raises(StorageUnavailable):
                await registry.delete("run")
            assert registry.all() == []
            with pytest.raises(RunNotFound):
                await registry.find("run")
            assert "it is deleted, and what is left of it is not removed yet: " in registry.problems["run"]
            # A run of its name waits for that.
            with pytest.raises(StorageUnavailable):
                await registry.create("run", spec_of(), ANYBODY)
            with pytest.raises(StorageUnavailable):
                await registry.delete("run")
            assert caplog.text.count("run run: it is deleted, and what is left of it") == 1
            medium.keeps = None
            await until(lambda: run not in registry._runs.values(), "the run to be ended")
            assert registry.problems == {}
            assert files_of_run(tmp_path / "data") == []
            with pytest.raises(RunNotFound):
                await registry.delete("run")
            assert (await new_run(registry)).epoch == 2

    run_async(work)


@pytest.mark.parametrize("kept", ["run.json", "checkpoints/"])
def test_what_storage_has_kept_of_a_deleted_run_is_removed_by_the_next_start(
    store: str, tmp_path: Path, kept: str
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            await trained(registry)
            medium.keeps = kept
            with pytest.raises(StorageUnavailable):
                await registry.delete("run")
        assert files_of_run(tmp_path / "data")
        with Redis.from_url(store) as client:
            client.flushall()
        async with process(store, tmp_path / "data", owner_ttl_seconds=1.0) as registry:
            await until(lambda: not registry._runs, "the run to be ended")
            assert files_of_run(tmp_path / "data") == []

    run_async(work)


def test_a_process_that_hears_late_of_a_deletion_leaves_the_next_run_its_files(store: str, tmp_path: Path) -> None:
    """Both have one directory, for journals too."""

    async def work() -> None:
        async with two(store, tmp_path / "data", tmp_path / "data") as (one, other):
            await trained(one, durability="journal")
            theirs = await other.find("run")
            await theirs._keeper.stop()
            await one.delete("run")
            run = await trained(one, durability="journal")
            left = files_of_run(tmp_path / "data")
            assert len(left) == 3
            await theirs._keeper.look()
            assert theirs.is_gone
            await until(lambda: theirs not in other._runs.values(), "the other to end the old run")
            assert files_of_run(tmp_path / "data") == left
            assert [each.step for each in await run.list_checkpoints()] == [0, 1]
            await push(run, claim_of(await lease_of(run), "two", 1))
        with Redis.from_url(store) as client:
            client.flushall()
        async with process(store, tmp_path / "data") as registry:
            await lease_of(await registry.find("run"))
            assert await pull(registry.get("run").shard(0)) == (2, 2.0)

    run_async(work)


def test_a_process_that_has_missed_a_deletion_deletes_the_next_run_whole(store: str, tmp_path: Path) -> None:
    """It knows of the one before alone, whose epoch is another."""

    async def work() -> None:
        async with two(store, tmp_path / "one", tmp_path / "other") as (one, other):
            await trained(one)
            theirs = await other.find("run")
            await theirs._keeper.stop()
            await one.delete("run")
            run = await trained(one)
            assert run.epoch == 2
            await other.delete("run")
            await until(lambda: run not in one._runs.values(), "the owner to hear")
            assert files_of_run(tmp_path / "one") == []
            with Redis.from_url(store, decode_responses=True) as client:
                assert client.hget(DELETED_KEY, "run") == "2"
            assert (await new_run(other)).epoch == 3

    run_async(work)


def test_a_process_that_has_missed_a_deletion_does_not_delete_the_next_run_for_it(store: str, tmp_path: Path) -> None:
    """It is asked to delete the one that it knows, by its id."""

    async def work() -> None:
        async with two(store, tmp_path / "one", tmp_path / "other") as (one, other):
            first = await trained(one)
            theirs = await other.find("run")
            await theirs._keeper.stop()
            await one.delete("run")
            run = await trained(one)
            with pytest.raises(RunNotFound):
                await other.delete("run", first.origin.id)
            await theirs._keeper.look()
            await until(lambda: theirs not in other._runs.values(), "the other to end the old run")
            assert not run.is_gone
            assert await pull(run.shard(0)) == (1, 1.0)
            await other.delete("run", run.origin.id)
            await until(lambda: run not in one._runs.values(), "the owner to hear")

    run_async(work)


def test_journals_of_a_host_that_was_away_are_removed_when_it_is_back(store: str, tmp_path: Path) -> None:
    """Checkpoints are elsewhere, and were removed."""

    async def work() -> None:
        shared = Medium(tmp_path / "shared")
        async with process(store, tmp_path / "away", storage=shared) as away:
            await trained(away, durability="journal")
        async with process(store, tmp_path / "here", storage=shared, journal_wait_seconds=0.0) as here:
            await lease_of(await here.find("run"))
            await here.delete("run")
        assert list((tmp_path / "away" / "journal" / "run").iterdir())
        async with process(store, tmp_path / "away", storage=shared):
            assert not (tmp_path / "away" / "journal" / "run").exists()

    run_async(work)


def test_a_run_that_could_not_be_created_is_none_to_anybody(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            medium.keeps = "run.json"
            with pytest.raises(StorageUnavailable):
                await registry.create("run", spec_of(), ANYBODY)
            with pytest.raises(RunNotFound):
                await registry.find("run")
            with Redis.from_url(store, decode_responses=True) as client:
                assert not client.smembers(RUNS_KEY)
            medium.keeps = None
            # Another process may have opened the one before meanwhile.
            assert (await new_run(registry)).epoch == 2

    run_async(work)


def test_a_name_that_stays_listed_without_a_run_is_taken_off_the_list(store: str, tmp_path: Path) -> None:
    """As where a process opens a run while another deletes it, or fails in creating one."""

    async def work() -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        async with (
            process(store, one, node_url="http://127.0.0.1:1") as registry,
            process(store, two, node_url="http://127.0.0.1:2"),
        ):
            with Redis.from_url(store, decode_responses=True) as client:
                await new_run(registry)
                client.sadd(RUNS_KEY, "none")
                await until(lambda: client.smembers(RUNS_KEY) == {"run"}, "the end of the name")

    run_async(work)
