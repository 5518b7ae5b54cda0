"""Readers of a shard's checkpoints: the memory that is counted for them, and their turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from freestep.errors import Overloaded, StorageUnavailable
from freestep_service.runs.consistent_reads import Reading
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from in_process import NUMEL, Medium, new_run, process, run_async, until

VECTOR = 4 * NUMEL
VECTORS = {"state": 2, "x": 3, "y": 2, "z": 3}
"""Of sgd_schedule_free: those that are taken while a state, or a point as F32, is read; the point is one of them."""


@asynccontextmanager
async def written(store: str, tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Run, Resources]]:
    """A run with a checkpoint of step 0, and what its process has."""
    async with process(store, tmp_path / "data", **settings) as registry:
        run = await new_run(registry, optimizer={"algorithm": "sgd_schedule_free"})
        await run.checkpoint()
        yield run, run._context.resources


async def read(run: Run, what: str) -> AbstractAsyncContextManager[object]:
    """A reading of a point or of the state, not yet begun."""
    shard = run.shard(0)
    checkpoint = await shard.find_checkpoint(0)
    if what == "state":
        return shard.read_checkpoint(checkpoint)
    return shard.read(Reading(what, "F32", checkpoint=checkpoint))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", VECTORS)
def test_memory_is_counted_before_it_is_taken_and_given_back_when_it_was_sent(
    store: str, tmp_path: Path, what: str
) -> None:
    async def work() -> None:
        async with written(store, tmp_path) as (run, resources):
            memory = resources.memory
            free = memory.free
            others = free - VECTORS[what] * VECTOR
            assert memory.try_reserve(others)
            async with await read(run, what):
                assert memory.free == (0 if what == "state" else (VECTORS[what] - 1) * VECTOR)
            assert memory.free == free - others
            assert memory.try_reserve(1)
            with pytest.raises(Overloaded, match="bytes of memory, and"):
                async with await read(run, what):
                    raise AssertionError
            memory.release(others + 1)
            assert memory.free == free

    run_async(work)


@pytest.mark.parametrize("what", VECTORS)
def test_readers_take_turns_and_are_sent_to_in_no_turn(store: str, tmp_path: Path, what: str) -> None:
    async def work() -> None:
        async with written(store, tmp_path, queue_seconds=0.05) as (run, resources):
            readers, free = resources.disk.readers, resources.memory.free
            taken = 0
            while not readers.locked():
                await readers.acquire()
                taken += 1
            with pytest.raises(Overloaded, match="others read checkpoints"):
                async with await read(run, what):
                    raise AssertionError
            assert resources.memory.free == free
            readers.release()
            async with await read(run, what), await read(run, what):
                assert resources.memory.free < free
            for _ in range(taken - 1):
                readers.release()

    run_async(work)


@pytest.mark.parametrize("what", VECTORS)
def test_the_memory_of_a_reader_who_has_left_is_given_back_once_the_disk_has_answered(
    store: str, tmp_path: Path, what: str
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with written(store, tmp_path, storage=medium) as (run, resources):
            free = resources.memory.free
            reading = await read(run, what)
            medium.hangs = ".safetensors"
            entering = asyncio.ensure_future(reading.__aenter__())
            await until(lambda: medium.reads[-1].endswith(".safetensors"), "the reading of tensors")
            entering.cancel()
            # Others are served meanwhile, also with the state.
            async with run.shard(0).read(Reading("x", "F32")), run.shard(0).read_state("", 1):
                assert not entering.done()
            assert resources.memory.free < free
            medium.may_go_on.set()
            await asyncio.wait([entering])
            assert entering.cancelled()
            assert resources.memory.free == free

    run_async(work)


def test_a_medium_that_cannot_be_read_is_no_damage(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with written(store, tmp_path, storage=medium) as (run, resources):
            free = resources.memory.free
            for what in VECTORS:
                reading = await read(run, what)
                medium.fails = ".safetensors"
                with pytest.raises(StorageUnavailable):
                    async with reading:
                        raise AssertionError
                medium.fails = None
                async with await read(run, what):
                    pass
            assert resources.memory.free == free

    run_async(work)
