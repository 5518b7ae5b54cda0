"""The writer where updates wait for the distances between their pushes, and all that is behind waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import Lost
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.log import Entry
from freestep_service.state.writer import Writer
from state.writers import FIRST, SECOND, comparing_shard, free, held, run, value


class Measured:
    """What a writer says of its shard's part of distances."""

    def __init__(self, writer: Writer) -> None:
        self.came: asyncio.Queue[tuple[Entry, Tensor]] = asyncio.Queue()
        writer.on_measured = lambda entry, part, applied: self.came.put_nowait((entry, part))

    async def next(self) -> tuple[int, float]:
        """The seq of the entry, and the distance between its update's two pushes."""
        entry, part = await self.came.get()
        (square,) = part.tolist()
        return entry.seq, square


@pytest.fixture(params=[0, 8], ids=["thread", "inline"])
def comparing(request: pytest.FixtureRequest) -> Iterator[Writer]:
    made = Writer(comparing_shard(), "test", DeviceLocks(request.param))
    made.resume(1, 0, 0)
    yield made
    asyncio.run(made.close())


def pair(pool: VectorPool, seq: int, epoch: int = 1) -> list[Entry]:
    """Two pushes, of which the second makes an update, and a place behind them."""
    first, second = held(pool, seq, epoch), held(pool, seq + 1, epoch)
    return [replace(first, advance=False), second, Entry(seq + 2, epoch, advance=False, checkpoint=True)]


def test_an_update_that_needs_distances_waits_for_them_and_others_wait_behind_it(comparing: Writer) -> None:
    async def work() -> None:
        pool, measured, taken = VectorPool(1, capacity=4), Measured(comparing), list[int]()
        comparing.on_taken = lambda entry: taken.append(entry.seq)
        first, second, mark = (comparing.submit(each) for each in pair(pool, 1))
        await first
        assert await measured.next() == (2, 1.0)
        # What is asked of the state meanwhile is asked of that before the update.
        before = await comparing.run(comparing.shard.copy_state)
        assert (before.seq, before.step, before.group) == (1, 0, {"": 1})
        assert (comparing.is_waiting, comparing.has_gap, comparing.taken_seq, comparing.position.seq) == (
            True,
            False,
            1,
            3,
        )
        assert not second.done()
        assert not mark.done()
        assert free(pool) == 3
        # Of another entry, of another epoch.
        comparing.add_distances(1, 3, FIRST)
        comparing.add_distances(2, 2, FIRST)
        assert comparing.is_waiting
        comparing.add_distances(1, 2, FIRST)
        assert not comparing.is_waiting
        await asyncio.gather(second, mark)
        assert taken == [1, 2, 3]
        assert (comparing.applied_step, comparing.shard.seq, value(comparing.shard)) == (1, 3, 1.0)
        assert free(pool) == 4
        # They come again, as after a repeated report.
        comparing.add_distances(1, 2, SECOND)
        for entry in pair(pool, 4):
            comparing.submit(entry)
        assert await measured.next() == (5, 1.0)
        assert measured.came.empty()

    run(work)


def test_distances_that_come_before_the_log_is_read_are_told_again(comparing: Writer) -> None:
    async def work() -> None:
        pool, measured = VectorPool(1, capacity=4), Measured(comparing)
        first, second, mark = pair(pool, 1)
        comparing.add_distances(1, 2, FIRST)
        waiting = [comparing.submit(each) for each in (mark, second)]
        assert comparing.has_gap
        assert not comparing.is_waiting
        comparing.submit(first)
        assert comparing.is_waiting
        assert await measured.next() == (2, 1.0)
        comparing.add_distances(1, 2, FIRST)
        await asyncio.gather(*waiting)
        assert value(comparing.shard) == 1.0

    run(work)


@pytest.mark.parametrize("end", ["forgotten", "new epoch", "closed"])
@pytest.mark.parametrize("when", ["measuring", "measured"])
def test_an_update_that_waits_can_be_lost(end: str, when: str) -> None:
    """Its memory is given back once the shard reads it no more."""

    async def work() -> None:
        comparing, pool = Writer(comparing_shard(), "test", DeviceLocks()), VectorPool(1, capacity=4)
        comparing.resume(1, 0, 0)
        measured, started, may_end = Measured(comparing), threading.Event(), threading.Event()
        measure = comparing.shard.square_distances
        kept = comparing.shard.copy_state()

        def slow(entry: Entry) -> Tensor:
            started.set()
            assert may_end.wait(30)
            return measure(entry)

        comparing.shard.square_distances = slow  # type: ignore[method-assign]
        first, *waiting = (comparing.submit(each) for each in pair(pool, 1))
        await first
        await asyncio.to_thread(started.wait, 30)
        if when == "measured":
            may_end.set()
            await measured.next()
        closing = None
        match end:
            case "forgotten":
                comparing.pause(forget=True)
            case "new epoch":
                comparing.pause()
                comparing.resume(2, 0, 0)
            case "closed":
                closing = asyncio.create_task(comparing.close())
        for each in waiting:
            with pytest.raises(Lost):
                await each
        assert free(pool) == (3 if when == "measuring" else 4)
        may_end.set()
        if closing is not None:
            await closing
        else:
            await comparing.load(comparing.shard.load, kept, 3)
        assert free(pool) == 4
        assert measured.came.empty()
        if closing is None:
            # The same places of the log may be taken again.
            comparing.shard.square_distances = measure  # type: ignore[method-assign]
            comparing.pause()
            comparing.resume(3, 0, 0)
            waiting = [comparing.submit(each) for each in pair(pool, 1, epoch=3)]
            assert await measured.next() == (2, 1.0)
            comparing.add_distances(3, 2, FIRST)
            await asyncio.gather(*waiting)
            assert value(comparing.shard) == 1.0
            await comparing.close()

    run(work)


def test_an_update_goes_on_waiting_over_a_pause(comparing: Writer) -> None:
    async def work() -> None:
        pool, measured = VectorPool(1, capacity=4), Measured(comparing)
        waiting = [comparing.submit(each) for each in pair(pool, 1)]
        comparing.pause()
        await waiting[0]
        assert await measured.next() == (2, 1.0)
        comparing.add_distances(1, 2, FIRST)
        assert not waiting[1].done()
        comparing.resume(1, 1, 0)
        await asyncio.gather(*waiting)
        assert (value(comparing.shard), measured.came.empty(), free(pool)) == (1.0, True, 4)

    run(work)


def test_nothing_follows_distances_that_cannot_be_measured(comparing: Writer) -> None:
    async def work() -> None:
        pool, failures, measured = VectorPool(1, capacity=4), list[bool](), Measured(comparing)
        comparing.on_failure = lambda: failures.append(True)

        def fail(entry: Entry) -> Tensor:
            raise RuntimeError("out of memory")

        comparing.shard.square_distances = fail  # type: ignore[method-assign]
        first, *waiting = (comparing.submit(each) for each in pair(pool, 1))
        await first
        for each in waiting:
            with pytest.raises(Lost):
                await each
        assert (failures, measured.came.empty(), free(pool)) == ([True], True, 4)
        with pytest.raises(ShardUnavailable, match="out of memory"):
            await comparing.run(comparing.shard.copy_state)

    run(work)
