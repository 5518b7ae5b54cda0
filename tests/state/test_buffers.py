"""The pool of vectors: who waits, what slow peers hold, and what is left when allocation fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freestep.errors import Overloaded
from freestep_service.state import buffers
from freestep_service.state.buffers import Hold, Vector, VectorPool
from freestep_service.state.memory_budget import MemoryBudget


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


@dataclass(eq=False)
class Peer:
    """A holder that is as slow as the test says."""

    slow: bool = False
    speed: float = 0.0
    can_end: bool = True
    ended: bool = field(default=False)
    excused: bool = field(default=False)

    def is_slow(self) -> bool:
        return self.slow

    def end(self) -> None:
        self.ended = True

    def on_excused(self) -> None:
        self.excused = True


def test_vectors_are_lent_first_come_first_served() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=2)
        first, second = await pool.acquire(30), await pool.acquire(30)
        assert pool.try_acquire() is None
        waiting = [asyncio.create_task(pool.acquire(30)) for _ in range(3)]
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
        vector = await pool.acquire(30)
        waiting = asyncio.create_task(pool.acquire(30))
        await asyncio.sleep(0)
        pool.release(vector)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await pool.acquire(30) is vector

    run(work)


@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_a_vectors_bytes_are_its_tensors(numel: int) -> None:
    vector = Vector(numel)
    assert len(vector.bytes) == 4 * numel
    vector.tensor().fill_(1.0)
    assert bytes(vector.bytes) == b"\x00\x00\x80\x3f" * numel
    assert vector.tensor(torch.bfloat16).numel() == numel


def test_a_wait_ends_in_time() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=1)
        vector = await pool.acquire(30)
        with pytest.raises(Overloaded):
            await pool.acquire(0.01)
        assert not pool.contended
        pool.release(vector)
        assert await pool.acquire(0) is vector

    run(work)


def test_a_vector_that_cannot_be_made_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Vector:
        raise OSError(12, "Cannot allocate memory")

    async def work() -> None:
        pool = VectorPool(3, capacity=1)
        with monkeypatch.context() as patched:
            patched.setattr(buffers, "Vector", fail)
            for _ in range(3):
                with pytest.raises(Overloaded, match="Cannot allocate"):
                    await pool.acquire(30)
        assert await pool.acquire(0)

    run(work)


def test_what_a_slow_peer_holds_is_counted_apart() -> None:
    async def work() -> None:
        reserve = MemoryBudget(12)
        pool = VectorPool(3, capacity=1, reserve=reserve)
        first = await pool.acquire(30)
        peer = Peer(slow=True)
        hold = Hold(pool, first, peer)
        second = await pool.acquire(30)
        assert peer.excused and not peer.ended
        assert second is not first
        assert not reserve.try_reserve(1)
        hold.release()
        assert reserve.try_reserve(12)
        pool.release(second)
        assert pool.try_acquire() is second
        # The slow peer's vector was one too many.
        assert pool.try_acquire() is None

    run(work)


def test_a_fast_peer_is_waited_for() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=1, reserve=MemoryBudget(1000))
        hold = Hold(pool, await pool.acquire(30), Peer())
        with pytest.raises(Overloaded):
            await pool.acquire(0.1)
        hold.release()
        assert await pool.acquire(0)

    run(work)


def test_where_the_reserve_is_used_up_the_slowest_is_ended_for_those_who_wait() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=2, reserve=MemoryBudget(0))
        peers = [Peer(slow=True, speed=2.0), Peer(slow=True, speed=1.0)]
        holds = [Hold(pool, await pool.acquire(30), peer) for peer in peers]
        await asyncio.sleep(0)
        # Alone, the slowest may hold it.
        assert not any(peer.ended for peer in peers)
        waiting = asyncio.create_task(pool.acquire(30))
        while not peers[1].ended:
            await asyncio.sleep(0.001)
        assert not peers[0].ended
        holds[1].release()
        assert await waiting is holds[1].vector

    run(work)


def test_a_peer_is_ended_although_a_slower_one_has_nothing_to_end() -> None:
    """A body that has come may wait for other shards' parts of its push."""

    async def work() -> None:
        pool = VectorPool(3, capacity=2, reserve=MemoryBudget(0))
        has_come, sends = Peer(slow=True, speed=1.0, can_end=False), Peer(slow=True, speed=2.0)
        Hold(pool, await pool.acquire(30), has_come)
        hold = Hold(pool, await pool.acquire(30), sends)
        waiting = asyncio.create_task(pool.acquire(30))
        while not sends.ended:
            await asyncio.sleep(0.001)
        assert not has_come.ended
        hold.release()
        assert await waiting is hold.vector

    run(work)


def test_what_comes_back_from_a_slow_peer_is_no_vector_more_for_those_who_wait() -> None:
    async def work() -> None:
        reserve = MemoryBudget(12)
        pool = VectorPool(3, capacity=1, reserve=reserve)
        hold = Hold(pool, await pool.acquire(30), Peer(slow=True))
        second = await pool.acquire(30)
        waiting = asyncio.create_task(pool.acquire(30))
        await asyncio.sleep(0)
        hold.release()
        # The reserve's memory is given back: the pool has its one vector.
        assert reserve.free == 12
        await asyncio.sleep(0)
        assert not waiting.done() and pool.most == 1
        pool.release(second)
        assert await waiting is second

    run(work)


def test_a_pool_becomes_smaller_as_its_vectors_come_back() -> None:
    async def work() -> None:
        shrunk: list[int] = []
        pool = VectorPool(3, capacity=4)
        pool.on_shrunk = lambda: shrunk.append(pool.most)
        taken = [await pool.acquire(30) for _ in range(4)]
        pool.release(taken.pop())
        pool.resize(2)
        # The one that is free leaves at once.
        assert pool.most == 3 and not shrunk
        waiting = asyncio.create_task(pool.acquire(30))
        await asyncio.sleep(0)
        pool.release(taken.pop())
        await asyncio.sleep(0)
        assert shrunk == [2] and not waiting.done()
        pool.release(taken.pop())
        taken.append(await waiting)
        for vector in taken:
            pool.release(vector)
        assert shrunk == [2] and pool.most == 2
        pool.resize(1)
        assert pool.most == 1 and pool.try_acquire() is not None and pool.try_acquire() is None

    run(work)


def test_who_waits_is_served_where_a_pool_becomes_larger() -> None:
    async def work() -> None:
        pool = VectorPool(3, capacity=1)
        first = await pool.acquire(30)
        waiting = [asyncio.create_task(pool.acquire(30)) for _ in range(3)]
        await asyncio.sleep(0)
        pool.resize(3)
        second, third = await waiting[0], await waiting[1]
        assert len({id(vector) for vector in (first, second, third)}) == 3 == pool.most
        assert not waiting[2].done()
        # A larger one again, before what is too many has come back: nothing has shrunk.
        pool.on_shrunk = lambda: pytest.fail("it has as many as before")
        pool.resize(1)
        pool.resize(3)
        pool.release(second)
        assert await waiting[2] is second

    run(work)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["acquire", "release", "slow", "cancel", "resize"]), st.integers(0, 5)), max_size=40
    ),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_no_vector_is_lent_twice_and_all_come_back(steps: list[tuple[str, int]], capacity: int, spare: int) -> None:
    """Whatever the order in which peers come, grow slow, leave and give back, and the pool is resized."""

    async def work() -> None:
        reserve = MemoryBudget(4 * spare)
        pool = VectorPool(1, capacity, reserve=reserve)
        waiting: list[asyncio.Task[Vector]] = []
        holds: list[tuple[Hold, Peer]] = []
        shrunk: list[int] = []
        pool.on_shrunk = lambda: shrunk.append(pool.most)

        async def settle() -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for task in [task for task in waiting if task.done()]:
                waiting.remove(task)
                if not task.cancelled():
                    peer = Peer()
                    holds.append((Hold(pool, task.result(), peer), peer))

        for what, which in steps:
            match what:
                case "acquire":
                    waiting.append(asyncio.create_task(pool.acquire(30)))
                case "release" if holds:
                    holds.pop(which % len(holds))[0].release()
                case "slow" if holds:
                    holds[which % len(holds)][1].slow = True
                    pool._look()
                case "cancel" if waiting:
                    waiting[which % len(waiting)].cancel()
                case "resize":
                    was_larger = pool.most > 1 + which % 3
                    shrunk.clear()
                    pool.resize(1 + which % 3)
                    assert not shrunk and pool.most >= pool.capacity and (was_larger or pool.most == pool.capacity)
            await settle()
            lent = [hold.vector for hold, _ in holds]
            assert len(set(map(id, lent))) == len(lent)
            assert len(lent) - sum(pool._holders.values()) <= pool.most
            # Whoever counts the vectors is told when there are fewer.
            assert shrunk in ([], [pool.capacity])
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for hold, _ in holds:
            hold.release()
        assert reserve.try_reserve(4 * spare)
        assert pool.most == pool.capacity
        free = [pool.try_acquire() for _ in range(pool.capacity + 1)]
        assert free[-1] is None
        assert len({id(vector) for vector in free[:-1]}) == pool.capacity

    asyncio.run(work())
