"""Changes of a run on a disk that is full, at several owners, and by requests that leave: what is answered is kept."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from freestep.api.control import ControlRequest
from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.tokens import ANYBODY
from in_process import NUMEL, Medium, lease_of, new_run, part_of, process, run_async, spec_of, until, until_shared
from losing_disk import LosingDisk

SLOWER, FASTER = ControlRequest(optimizer={"lr": 0.5}), ControlRequest(optimizer={"lr": 2.0})
GATHERING = ControlRequest(aggregation={"policy": "buffered", "batch": 4})


def complete(data: Path) -> list[str]:
    """The checkpoints that are."""
    return sorted(each.parent.name for each in data.rglob("complete.json"))


@pytest.mark.parametrize("key", ["", "key"])
def test_a_repetition_at_another_owner_is_not_answered_before_it_is_on_disk(
    store: str, tmp_path: Path, key: str
) -> None:
    async def work() -> None:
        data = tmp_path / "data"
        first, second = Medium(data), Medium(data)
        async with (
            process(store, data, storage=first, node_url="http://127.0.0.1:1") as registry,
            process(store, data, storage=second, node_url="http://127.0.0.1:2") as other,
        ):
            one, _ = await registry.create("run", spec_of(2), ANYBODY)
            two = await other.find("run")
            await until_shared(one, two)
            await lease_of(one)
            zeros = torch.zeros(NUMEL)
            await asyncio.gather(
                *(
                    run.initialize(run.shard(index), part_of(run, index, zeros), "upload")
                    for run in (one, two)
                    for index in range(2)
                    if run.owns(index)
                )
            )
            first.is_full = second.is_full = True
            for run in (one, two, one):
                with pytest.raises(StorageUnavailable):
                    await run.controls.change(SLOWER, key, "me")
                assert (await run.status()).control.optimizer == {"lr": 0.5}
            before = complete(data)
            first.is_full = second.is_full = False
            await two.controls.change(SLOWER, key, "me")
            kept = complete(data)
            assert kept != before
            # It is known to be there now.
            await two.controls.change(SLOWER, key, "me")
            assert complete(data) == kept

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_repetition_is_not_answered_before_it_is_in_a_journal(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    disk = LosingDisk(monkeypatch)

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            await run.controls.change(SLOWER, "", "me")
            disk.failures = 10**9
            for _ in range(3):
                with pytest.raises((StorageUnavailable, ShardUnavailable)):
                    await run.controls.change(FASTER, "", "me")
            disk.failures = 0
            while True:
                with suppress(StorageUnavailable, ShardUnavailable):
                    await run.controls.change(FASTER, "", "me")
                    break
                await asyncio.sleep(0.01)
            assert (await run.status()).control.optimizer == {"lr": 2.0}

    run_async(work)


def test_a_request_that_leaves_takes_no_memory_with_it(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry)
            resources = registry._resources
            free = resources.memory.free
            may_compile = threading.Event()
            resources.locks.compiler.submit(may_compile.wait, 60)
            try:
                change = asyncio.create_task(run.controls.change(GATHERING, "", "me"))
                await until(lambda: resources.memory.free < free, "the memory for the change")
                change.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await change
            finally:
                may_compile.set()
            assert resources.memory.free == free
            assert not (await run.status()).control.aggregation
            await run.controls.change(GATHERING, "", "me")
            assert resources.memory.free < free

    run_async(work)
