"""The writer: entries in the order of the log on one thread, the memory that they own, and updates that fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import Lost
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.log import Entry
from freestep_service.state.writer import Writer
from state.writers import counting_shard, entry, free, held, run, value


@pytest.fixture(params=[0, 1], ids=["thread", "inline"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    shard = counting_shard()
    made = Writer(shard, "test", DeviceLocks(request.param))
    yield made
    asyncio.run(made.close())


def test_entries_are_applied_in_the_order_of_the_log(writer: Writer) -> None:
    async def work() -> None:
        writer.resume(1, 0, 0)
        third, second = writer.submit(entry(3)), writer.submit(entry(2))
        assert writer.has_gap
        assert (writer.taken_seq, writer.position.seq) == (0, 3)
        await writer.submit(entry(1))
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
        await writer.submit(entry(1))
        for late in (entry(1), entry(2, epoch=0), entry(2, epoch=2)):
            with pytest.raises(Lost):
                await writer.submit(late)
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
        await writer.submit(entry(1))
        cut = await writer.run(writer.shard.copy_state)
        await writer.submit(entry(2))
        writer.pause()
        old, new = writer.submit(entry(3)), writer.submit(entry(2, epoch=2))
        await writer.load(writer.shard.load, cut, 2)
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
        await writer.submit(entry(1))
        assert await waiting[1]
        assert not waiting[0].done()
        await writer.submit(entry(2))
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


def test_an_entry_owns_its_memory_until_it_is_applied_or_lost(writer: Writer) -> None:
    async def work() -> None:
        pool = VectorPool(1, capacity=4)
        writer.resume(1, 0, 0)
        second = writer.submit(held(pool, 2))
        assert free(pool) == 3
        await writer.submit(held(pool, 1))
        await second
        assert free(pool) == 4
        for late in (held(pool, 1), held(pool, 3, epoch=0)):
            with pytest.raises(Lost):
                await writer.submit(late)
        gap = writer.submit(held(pool, 9))
        writer.pause(forget=True)
        with pytest.raises(Lost):
            await gap
        assert free(pool) == 4
        assert value(writer.shard) == 3.0

    run(work)


def test_a_shard_that_is_given_up_keeps_the_memory_of_an_update_until_its_end() -> None:
    """Else the next body would be received into what the writer's thread still reads."""

    async def work() -> None:
        started, may_end = threading.Event(), threading.Event()
        writer = Writer(counting_shard(), "test", DeviceLocks())
        pool = VectorPool(1, capacity=1)
        apply = writer.shard.apply

        def slow(entry: Entry) -> None:
            started.set()
            assert may_end.wait(30)
            apply(entry)

        writer.shard.apply = slow  # type: ignore[method-assign]
        writer.resume(1, 0, 0)
        applied = writer.submit(held(pool, 1))
        closing = asyncio.create_task(writer.close())
        await asyncio.to_thread(started.wait, 30)
        assert free(pool) == 0
        may_end.set()
        await closing
        await applied
        assert free(pool) == 1
        assert value(writer.shard) == 1.0

    run(work)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_nothing_follows_an_update_that_fails(writer: Writer, fails_at: int) -> None:
    async def work() -> None:
        pool = VectorPool(1, capacity=4)
        failures: list[bool] = []
        apply, kept = writer.shard.apply, writer.shard.copy_state()

        def fail(entry: Entry) -> None:
            if entry.seq == fails_at:
                # As a device that runs out of memory within an update leaves it.
                writer.shard.seq = entry.seq
                raise RuntimeError("out of memory")
            apply(entry)

        writer.shard.apply = fail  # type: ignore[method-assign]
        writer.on_failure = lambda: failures.append(True)
        writer.resume(1, 0, 0)
        entries = [writer.submit(held(pool, seq)) for seq in (1, 2, 3)]
        outcomes = await asyncio.gather(*entries, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [
            *[type(None)] * (fails_at - 1),
            ShardUnavailable,
            *[Lost] * (3 - fails_at),
        ]
        assert free(pool) == 4
        assert failures == [True]
        assert (writer.applied_step, value(writer.shard)) == (fails_at - 1, float(sum(range(fails_at))))
        # Its state is neither read, nor written as a checkpoint, nor gone on from.
        with pytest.raises(ShardUnavailable, match="out of memory"):
            await writer.run(writer.shard.copy_state)
        with pytest.raises(Lost):
            await writer.submit(held(pool, 4))
        assert not await writer.reach(9, 20)
        writer.shard.apply = apply  # type: ignore[method-assign]
        await writer.load(writer.shard.load, kept, 2)
        writer.resume(2, 0, 0)
        await writer.submit(held(pool, 1, epoch=2))
        assert value(writer.shard) == 1.0

    run(work)
