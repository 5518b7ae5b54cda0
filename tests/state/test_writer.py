"""The order of the log on one thread, and the pool of vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import torch

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.records import Lost
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.shard import Entry, Shard
from freestep_service.state.writer import Writer


@pytest.fixture(params=[0, 1], ids=["thread", "inline"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    """A writer of a shard that counts: lr 1, and each entry's gradient is minus its place in the log."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [1]}],
        }
    )
    shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"))
    shard.initialize(torch.zeros(1), epoch=1)
    made = Writer(shard, "test", locks=DeviceLocks(request.param))
    yield made
    made.close()


def entry(seq: int, epoch: int = 1) -> Entry:
    return Entry(seq, epoch, advance=True, gradient=torch.tensor([-float(seq)]))


def value(shard: Shard) -> float:
    out = torch.empty(1)
    shard.copy_point("y", out)
    return float(out)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def test_entries_are_applied_in_the_order_of_the_log(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        third, second = writer.submit(entry(3)), writer.submit(entry(2))
        assert writer.has_gap
        assert (writer.taken_seq, writer.known_seq) == (0, 3)
        await writer.apply(entry(1))
        await asyncio.gather(second, third)
        assert not writer.has_gap
        assert (writer.shard.seq, value(writer.shard), writer.applied_step) == (3, 6.0, 3)

    run(work)


def test_entries_wait_while_the_writer_is_paused(writer: Writer) -> None:
    async def work() -> None:
        future = writer.submit(entry(1))
        assert not future.done()
        writer.resume(1, 0, 0)
        await future
        assert writer.shard.step == 1

    run(work)


def test_old_entries_and_old_epochs_are_lost(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        await writer.apply(entry(1))
        for late in (entry(1), entry(2, epoch=0), entry(2, epoch=2)):
            with pytest.raises(Lost):
                await writer.apply(late)
        assert value(writer.shard) == 1.0

    run(work)


def test_what_is_held_may_be_forgotten(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        cut_off = writer.submit(entry(2))
        writer.pause(forget=True)
        with pytest.raises(Lost):
            await cut_off
        assert writer.era == 1
        again = writer.submit(entry(1))
        writer.resume(1, 0, 0)
        await again
        assert value(writer.shard) == 1.0

    run(work)


def test_a_new_epoch_keeps_its_own_entries(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        await writer.apply(entry(1))
        cut = await writer.run(writer.shard.copy_state)
        await writer.apply(entry(2))
        writer.pause()
        old, new = writer.submit(entry(3)), writer.submit(entry(2, epoch=2))
        await writer.run(writer.shard.load, cut, 2)
        writer.resume(2, 1, 1)
        with pytest.raises(Lost):
            await old
        await new
        assert (writer.epoch, writer.shard.seq, value(writer.shard)) == (2, 2, 3.0)

    run(work)


def test_a_step_is_waited_for(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        waiting = [asyncio.create_task(writer.reach(step, 20)) for step in (2, 1, 2)]
        await asyncio.sleep(0)
        await writer.apply(entry(1))
        assert await waiting[1]
        assert not waiting[0].done()
        await writer.apply(entry(2))
        assert await waiting[0]
        assert await waiting[2]
        assert await writer.reach(2, 0)
        assert not await writer.reach(3, 0)
        assert not await writer.reach(3, 0.01)

    run(work)


def test_a_wait_ends_with_its_epoch(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        waiting = asyncio.create_task(writer.reach(5, 20))
        await asyncio.sleep(0)
        writer.pause()
        writer.resume(2, 0, 0)
        assert not await waiting

    run(work)


def test_vectors_are_lent_first_come_first_served() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=2)
        first, second = await pool.acquire(), await pool.acquire()
        assert pool.try_acquire() is None
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        assert pool.contended
        waiting[0].cancel()
        pool.release(first)
        assert await waiting[1] is first
        pool.release(second)
        assert await waiting[2] is second
        assert not pool.contended
        pool.release(first)
        assert pool.try_acquire() is first

    run(work)


def test_a_vector_that_comes_too_late_goes_to_the_next() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=1)
        vector = await pool.acquire()
        waiting = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        pool.release(vector)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await pool.acquire() is vector

    run(work)


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_a_vectors_bytes_are_its_tensors(numel: int) -> None:
    vector = Vector(numel)
    assert len(vector.bytes) == 4 * numel
    vector.tensor().fill_(1.0)
    assert bytes(vector.bytes) == b"\x00\x00\x80\x3f" * numel
    assert vector.tensor(torch.bfloat16).numel() == numel
