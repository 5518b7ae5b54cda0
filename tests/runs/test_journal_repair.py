"""Journaled runs whose journals are damaged, given up or gone: nothing is lost that nobody gave up."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep.api.models import MetricReport
from freestep.errors import FreestepError
from freestep_service.state.shard import StateCopy
from freestep_service.storage.journal_files import segment_paths
from freestep_service.storage.journal_format import Kind
from freestep_service.storage.journal_repair import discard, repair
from harness import ProcessService
from harness import store as own_store
from in_process import claim_of, lease_of, new_run, process, push, run_async, until
from plain_calls import SGD, Api
from runs.journaled import (
    DAMAGE,
    break_frame,
    crashed,
    is_same,
    journal_dirs,
    journaled_run,
    last_entry,
    opened,
    states,
)
from storage.journals import frame_places, journal_command


def test_damage_is_refused_until_it_is_repaired(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            await journaled_run(registry, 3)
            (directory,) = journal_dirs(tmp_path / "data")
            path, newest = last_entry(directory)
            whole = path.read_bytes()
            broken = bytearray(whole)
            broken[frame_places(path, Kind.ENTRY)[0].at + 45] ^= 1
            assert newest.at > 0
            path.write_bytes(broken)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again = await other.find("run")
                await until(lambda: again.problem is not None, "the problem")
                assert "is damaged" in (again.problem or "")
                assert "freestep journal repair" in (again.problem or "")
                with pytest.raises(FreestepError):
                    await again.leases.grant("worker", None)
            path.write_bytes(whole)

    run_async(work)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_refused_journal_is_not_read_again_until_it_changes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    opened_segments: list[Path] = []
    os_open = os.open

    def counting(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".journal"):
            opened_segments.append(Path(path))
        return os_open(path, *arguments, **options)

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            await journaled_run(registry, 3)
            image = shutil.copytree(tmp_path / "data", tmp_path / "image")
        (directory,) = journal_dirs(image)
        break_frame(directory, damage, 1)
        (image / "redis").mkdir()
        with own_store("valkey", image / "redis") as url:
            async with process(url, image) as registry:
                again = await registry.find("run")
                await until(lambda: again.problem is not None, "the problem")
                monkeypatch.setattr(os, "open", counting)
                for _ in range(3):
                    await again.refresh()
                    assert "freestep journal repair" in (again.problem or "")
                assert opened_segments == []
                assert len(segment_paths(directory)) <= 2
                await asyncio.to_thread(repair, directory)
                await opened(registry)
                assert (await again.status()).step == 1
                assert opened_segments

    run_async(work)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_running_service_goes_on_with_what_a_repair_has_kept(store: str, tmp_path: Path, damage: str) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, lease = await journaled_run(registry, 1)
            before = await states(run)
            for step in (1, 2):
                await push(run, claim_of(lease, f"key-{step}", step))
            (directory,) = journal_dirs(tmp_path / "data")
            path, _ = last_entry(directory)
            whole = path.read_bytes()
            break_frame(directory, damage, 1)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again = await other.find("run")
                await until(lambda: again.problem is not None, "the problem")
                assert "freestep journal repair" in (again.problem or "")
                (image,) = tmp_path.glob("image-*")
                (damaged,) = journal_dirs(image)
                done = await asyncio.to_thread(repair, damaged)
                assert done is not None and done.aside
                await until(lambda: again.problem is None, "the run without the problem")
                fresh = await lease_of(again, "fresh")
                weights = [each.tensors for each in await states(again)]
                assert all(torch.equal(weights[0][name], before[0].tensors[name]) for name in weights[0])
                status = await again.status()
                assert (status.epoch, status.step) == (2, 1)
                await push(again, claim_of(fresh, "new", 1))
                assert (await again.status()).step == 2
            path.write_bytes(whole)

    run_async(work)


@pytest.mark.parametrize("is_redis_lost", [False, True], ids=["", "redis too"])
@pytest.mark.parametrize(
    ("shards", "act", "kept"),
    [(1, "repair", 3), (2, "repair", 4), (3, "repair", 4), (2, "discard", 2), (2, "discard all", 2)],
)
def test_after_a_repair_of_one_shard_all_go_on_at_the_newest_step_that_all_have(
    store: str, tmp_path: Path, shards: int, act: str, kept: int, is_redis_lost: bool
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            expected: list[list[StateCopy]] = [await states(run)]
            for step in range(6):
                await push(run, claim_of(lease, f"key-{step}", step), -1.0 - step)
                await run.reports.report(MetricReport(name="loss", step=step, value=float(step)))
                expected.append(await states(run))
                if step == 1:
                    await run.checkpoint()
            image = shutil.copytree(tmp_path / "data", tmp_path / "image")
        directories = journal_dirs(image)
        if act == "repair":
            # The entry of the push of step 4.
            break_frame(directories[-1], "an entry", 2)
            assert journal_command(image, "repair", "run") == 0
        elif act == "discard":
            assert discard(directories[1]) is not None
        else:
            assert journal_command(image, "repair", "run", "--discard") == 0
        (tmp_path / "empty").mkdir()
        with own_store("valkey", tmp_path / "empty") as empty:
            async with process(empty if is_redis_lost else store, image) as registry:
                again, fresh = await opened(registry)
                status = await again.status()
                assert (status.epoch, status.step) == (2, kept)
                weights = [each.tensors for each in await states(again)]
                assert all(
                    torch.equal(one[name], other.tensors[name])
                    for one, other in zip(weights, expected[kept], strict=True)
                    for name in one
                )
                # What was given up may be sent again, and what is kept was counted once.
                await push(again, claim_of(fresh, "key-9", kept))
                assert (await again.status()).step == kept + 1
                before = await states(again)
                async with crashed(tmp_path, image) as other:
                    last, _ = await opened(other)
                    assert last.epoch == 2
                    assert all(map(is_same, await states(last), before))

    run_async(work, 120.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_journals_that_are_given_up_beside_their_service_bring_it_back_to_its_checkpoint(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, lease = await journaled_run(registry, 3, shards)
            for directory in journal_dirs(tmp_path / "data"):
                assert discard(directory) is not None
            with pytest.raises(FreestepError):
                await push(run, claim_of(lease, "key-3", 3))
            await until(lambda: run.epoch == 2, "the new epoch")
            lease = await lease_of(run)
            # Through all numbers that segments had before.
            for step in range(3):
                await push(run, claim_of(lease, f"new-{step}", step))
                for index in range(run.count):
                    journal = run.shard(index).core.journal
                    assert journal is not None
                    journal.mark()
            status = await run.status()
            assert (status.epoch, status.step) == (2, 3)
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_journal_that_goes_beside_its_service_is_waited_for(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, lease = await journaled_run(registry, 3, shards)
            before = await states(run)
            # As a disk that is not mounted any more.
            journals, elsewhere = tmp_path / "data" / "journal", tmp_path / "elsewhere"
            journals.rename(elsewhere)
            with pytest.raises(FreestepError):
                await push(run, claim_of(lease, "key-3", 3))
            await until(lambda: "its files are gone" in (run.problem or ""), "the problem")
            assert run.epoch == 1
            shutil.rmtree(journals, ignore_errors=True)
            elsewhere.rename(journals)
            await until(lambda: run.problem is None, "the run without the problem")
            await lease_of(run, "opener")
            # It may have been decided, and written to a file that was open.
            await push(run, claim_of(lease, "key-3", 3))
            assert (run.epoch, (await run.status()).step) == (1, 4)
            assert [each.seq for each in await states(run)] == [each.seq + 1 for each in before]

    run_async(work)


@pytest.mark.slow
def test_a_run_whose_journal_is_gone_goes_back_to_its_checkpoint_only_where_that_is_said(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create(optimizer=SGD, durability="journal")
    lease = api.lease()
    for step in range(3):
        api.push(lease, step)
    service.kill()
    journal = service.data_dir / "journal"
    journal.rename(tmp_path / "unmounted")
    service.start(503)
    answer = api.http.get("/readyz").json()
    assert "start the service" in answer["detail"]
    service.kill()
    shutil.copytree(tmp_path / "unmounted", journal, dirs_exist_ok=True)
    service.start()
    assert (api.status()["epoch"], api.status()["step"]) == (1, 3)
    service.kill()
    shutil.rmtree(journal)
    service.start(journal_wait_seconds=0)
    assert (api.status()["epoch"], api.status()["step"]) == (2, 0)
