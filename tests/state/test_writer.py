"""The writer: entries in the order of the log on one thread, the memory that they own, and updates that fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from freestep.api.models import RunSpec
from freestep.errors import ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.domain.records import Lost
from freestep_service.state.buffers import Hold, VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from freestep_service.state.writer import Writer


def counting_shard() -> Shard:
    """A shard that counts: lr 1, and each entry's gradient is minus its place in the log."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [1]}],
        }
    )
    shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"))
    shard.initialize(torch.zeros(1), epoch=1)
    return shard


@pytest.fixture(params=[0, 1], ids=["thread", "inline"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    shard = counting_shard()
    made = Writer(shard, "test", DeviceLocks(request.param))
    yield made
    asyncio.run(made.close())


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


class Peer:
    """A holder that is as slow as it is told."""

    speed = 0.0

    def is_slow(self) -> bool:
        return False

    def end(self) -> None: ...

    def on_excused(self) -> None: ...


def held(pool: VectorPool, seq: int, epoch: int = 1) -> Entry:
    """An entry whose gradient lies in a vector of a pool."""
    vector = pool.try_acquire()
    assert vector is not None
    gradient = vector.tensor()
    gradient.fill_(-float(seq))
    return Entry(seq, epoch, advance=True, gradient=gradient, hold=Hold(pool, vector, Peer()))


def free(pool: VectorPool) -> int:
    """How many vectors of a pool are not lent."""
    taken = []
    while (vector := pool.try_acquire()) is not None:
        taken.append(vector)
    for vector in taken:
        pool.release(vector)
    return len(taken)


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


def comparing_shard() -> Shard:
    """One of a run's shards under krum; a push is minus its place in the log. Of two the first is the update."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "sync", "max_batch": 5, "robust": "krum", "f": 1},
            "parameters": [{"name": "w", "shape": [1]}],
        }
    )
    shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"), is_part=True)
    shard.initialize(torch.zeros(1), epoch=1)
    return shard


@pytest.fixture(params=[0, 1], ids=["thread", "inline"])
def comparing(request: pytest.FixtureRequest) -> Iterator[Writer]:
    made = Writer(comparing_shard(), "test", DeviceLocks(request.param))
    made.resume(1, 0, 0)
    yield made
    asyncio.run(made.close())


def pair(pool: VectorPool, seq: int, epoch: int = 1) -> list[Entry]:
    """Two pushes, of which the second makes an update, and a place behind them."""
    first, second = held(pool, seq, epoch), held(pool, seq + 1, epoch)
    return [replace(first, advance=False), second, Entry(seq + 2, epoch, advance=False, checkpoint=True)]


FIRST, SECOND = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
"""Distances between two pushes."""


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
