"""Points of a shard's state as bodies ready to send: one per (place, point, dtype), shared by all who read it.

A snapshot does not change while anybody reads it. A shard has a fixed number of vectors for snapshots, and more where
slow readers hold them (`buffers`). y as fp32 is not copied but lent (`views`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from freestep.api.models import Point
from freestep.errors import Overloaded
from freestep_service.state.bodies import body, copy_point
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.compute import HOST
from freestep_service.state.shard import DTYPES
from freestep_service.state.transfers import GRACE_S, Transfer
from freestep_service.state.views import Copying, PointView
from freestep_service.state.writer import Writer

__all__ = ["PointBody", "Snapshot", "Snapshots"]

_LOOK_S = 0.05
"""Seconds between two looks at whether slow readers hold all memory."""
_LARGE = 1024 * 1024
"""Elements from which on a copy is sent while it is still being made."""


@dataclass
class PointBody:
    """A shard's part of a point of one step, as a safetensors body: `header` and then `data`."""

    epoch: int
    step: int
    header: bytes
    data: memoryview
    seq: int | None = None
    """The place in the log that the point is of, where shards have to agree on it."""
    copying: Copying | None = None
    scheduled_lr: tuple[float, ...] | None = None
    """The learning rates of the step, by param group."""
    sent: int = 0
    """Bytes that the peer's connection has taken."""
    end: Callable[[], None] = lambda: None
    """Ends the sending, where the memory is needed and the peer is slow."""

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.header) + len(self.data)

    async def reach(self, size: int) -> None:
        """Returns when the first `size` bytes of the tensors are there. Raises what made their copy fail."""
        if self.copying is not None:
            await self.copying.reach(size)

    def slices(self, begin: int, end: int) -> tuple[memoryview, memoryview]:
        """Bytes `begin` to `end` of the body, those of the header and those of the tensors."""
        split = len(self.header)
        return (
            memoryview(self.header)[begin:end],
            self.data[max(begin - split, 0) : max(end - split, 0)],
        )


@dataclass(eq=False)
class Snapshot:
    """A point in memory that stays as it is, and who needs it. It holds one vector of the pool."""

    point: Point
    dtype: str
    vector: Vector = field(repr=False)
    taken: asyncio.Future[PointView]
    seq: int | None = None
    wanted: str = ""
    """What its tickets ask for, as consistent reads word it."""
    tickets: set[str] = field(default_factory=set)
    """The reads that it is kept for, and that have not come yet."""
    readers: set[Transfer] = field(default_factory=set)
    needed: int = 0
    """How many need it: readers, tickets, and the copy that is still being made."""
    unread_since: float = 0.0
    """By the event loop's clock, where nobody reads it."""
    apart: bool = False
    """Whether its memory is counted with that of slow peers."""
    on_apart: Callable[[], None] = lambda: None
    """Called when that begins."""

    def is_slow(self) -> bool:
        """Whether no reader is fast; where none has come, whether the peer that asked for it is slow to fetch it."""
        if not self.taken.done():
            return False
        if not self.readers:
            return self.taken.get_loop().time() > self.unread_since + GRACE_S
        return all(reader.is_slow() for reader in self.readers)

    @property
    def speed(self) -> float:
        """Bytes a second of its fastest reader."""
        return max((reader.speed for reader in self.readers), default=0.0)

    @property
    def can_end(self) -> bool:
        return bool(self.readers)

    def end(self) -> None:
        """Ends its readers."""
        for reader in self.readers:
            reader.end()

    def on_excused(self) -> None:
        self.apart = True
        self.on_apart()


class Snapshots:
    """The snapshots of one shard."""

    def __init__(self, run: str, writer: Writer, pool: VectorPool) -> None:
        self.pool = pool
        self._run = run
        self._writer = writer
        self._newest: dict[tuple[Point, str], Snapshot] = {}
        """By point and dtype, the snapshot that another reader of the same step may share."""
        self._making: dict[tuple[Point, str], asyncio.Task[Snapshot]] = {}

    # The newest step

    async def newest(self, point: Point, dtype: str, timeout_s: float, *, waits_for_slow: bool = True) -> Snapshot:
        """A snapshot of a step no older than the one that is applied now; the caller lets it go.

        Raises Overloaded when no memory is free in time, or, unless the caller waits for slow readers, as soon as they
        hold all of it.
        """
        wanted = (self._writer.epoch, self._writer.applied_step)
        key = (point, dtype)
        while True:
            newest = self._newest.get(key)
            if newest is None or _step_of(newest) < wanted:
                newest = await self._made(key, timeout_s, waits_for_slow=waits_for_slow)
            if _step_of(newest) >= wanted and self._newest.get(key) is newest:
                if not newest.needed:
                    self.pool.watch(newest)
                newest.needed += 1
                return newest

    async def _made(self, key: tuple[Point, str], timeout_s: float, *, waits_for_slow: bool) -> Snapshot:
        """A new snapshot, which all who wait for it share."""
        making = self._making.get(key)
        if making is None:
            vector = self._recycle(key)
            begun = None if vector is None else self.take(*key, vector)
            if begun is not None and begun.taken.done():
                return self._keep(key, begun)
            making = self._making[key] = asyncio.create_task(self._make(key, begun, timeout_s))
            # Those who wait may leave before it fails.
            making.add_done_callback(lambda made: made.cancelled() or made.exception())
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not making.done():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or (not waits_for_slow and self.pool.is_held_by_slow_peers):
                raise Overloaded("no memory for the answer was free in time")
            await asyncio.wait([making], timeout=left if waits_for_slow else min(left, _LOOK_S))
        return making.result()

    async def _make(self, key: tuple[Point, str], begun: Snapshot | None, timeout_s: float) -> Snapshot:
        try:
            snapshot = begun or self.take(*key, await self.pool.acquire(timeout_s))
            try:
                await asyncio.wait([snapshot.taken])
            except asyncio.CancelledError:
                self.let_go(snapshot)
                raise
            return self._keep(key, snapshot)
        finally:
            del self._making[key]

    def _keep(self, key: tuple[Point, str], snapshot: Snapshot) -> Snapshot:
        """Lets others share a snapshot that was taken; they need it from here on."""
        try:
            snapshot.taken.result()
        except BaseException:
            self.let_go(snapshot)
            raise
        replaced, self._newest[key] = self._newest.get(key), snapshot
        if replaced is not None:
            self._release_unneeded(replaced)
        snapshot.needed -= 1
        return snapshot

    def _recycle(self, key: tuple[Point, str]) -> Vector | None:
        """A free vector, or that of a snapshot which nobody reads: the one that the new one replaces first."""
        vector = self.pool.try_acquire()
        if vector is not None:
            return vector
        for other in sorted(self._newest, key=lambda other: other != key):
            if self._newest[other].needed == 0:
                unneeded = self._newest.pop(other)
                self.pool.unwatch(unneeded)
                return unneeded.taken.result().end()
        return None

    # Any place

    def take(self, point: Point, dtype: str, vector: Vector, seq: int | None = None) -> Snapshot:
        """A snapshot of the state that the writer's next entry finds; the caller needs it until it lets it go."""
        try:
            taken = _take(self._writer, point, dtype, vector)
        except BaseException:
            self.pool.release(vector)
            raise
        snapshot = Snapshot(point, dtype, vector, taken, seq, needed=1)
        snapshot.unread_since = taken.get_loop().time()
        self.pool.watch(snapshot)
        taken.add_done_callback(lambda taken: self._keep_while_copied(snapshot, taken))
        return snapshot

    def _keep_while_copied(self, snapshot: Snapshot, taken: asyncio.Future[PointView]) -> None:
        if taken.cancelled() or taken.exception() is not None:
            return
        copying = taken.result().copying
        if copying is not None and not copying.done.done():
            snapshot.needed += 1
            copying.done.add_done_callback(lambda copied: self._copied(snapshot, copied))

    def _copied(self, snapshot: Snapshot, copied: asyncio.Future[None]) -> None:
        if copied.exception() is not None:
            self._newest = {key: newest for key, newest in self._newest.items() if newest is not snapshot}
        self.let_go(snapshot)

    @asynccontextmanager
    async def reading(self, snapshot: Snapshot, floor: float) -> AsyncIterator[PointBody]:
        """The snapshot as a body, for a caller that needs it; it is let go when the block ends.

        floor: bytes a second below which its memory is counted with that of slow peers.
        """
        loop = asyncio.get_running_loop()
        transfer = None
        try:
            view = await asyncio.shield(snapshot.taken)
            manifest = self._writer.shard.manifest
            header, data = body(view.vector, manifest, snapshot.dtype, self._run, view.epoch, view.step, snapshot.point)
            sent = PointBody(view.epoch, view.step, header, data, snapshot.seq, view.copying, view.scheduled_lr)
            transfer = Transfer(lambda: sent.sent, loop.time, floor, lambda: sent.end())
            snapshot.readers.add(transfer)
            yield sent
        finally:
            if transfer is not None:
                snapshot.readers.discard(transfer)
                snapshot.unread_since = loop.time()
            self.let_go(snapshot)

    def let_go(self, snapshot: Snapshot) -> None:
        """Ends one need of a snapshot."""
        snapshot.needed -= 1
        self._release_unneeded(snapshot)

    def _release_unneeded(self, snapshot: Snapshot) -> None:
        if snapshot.needed:
            return
        if not snapshot.taken.done():
            snapshot.taken.add_done_callback(lambda _: self._release_unneeded(snapshot))
            return
        if snapshot.taken.cancelled() or snapshot.taken.exception() is not None:
            self.pool.release(snapshot.vector, snapshot)
            return
        view = snapshot.taken.result()
        key = (snapshot.point, snapshot.dtype)
        is_newest = self._newest.get(key) is snapshot
        # A lent y is to be had again for nothing, and would have to be copied when the state moves on.
        if is_newest and view.is_copy and not snapshot.apart and not self.pool.contended:
            self.pool.unwatch(snapshot)
            return
        if is_newest:
            del self._newest[key]
        self.pool.release(view.end(), snapshot)


def _step_of(snapshot: Snapshot) -> tuple[int, int]:
    view = snapshot.taken.result()
    return view.epoch, view.step


def _take(writer: Writer, point: Point, dtype: str, spare: Vector) -> asyncio.Future[PointView]:
    """A point of the state that the writer's next entry finds, in the state's own memory or in `spare`.

    The future of a large copy is done when the copy has begun.
    """
    shard = writer.shard
    if (point, dtype) == ("y", "F32"):
        return writer.call(shard.lend, spare)
    if dtype in DTYPES and shard.device == HOST and shard.manifest.numel >= _LARGE:
        return _begin_copy(writer, point, dtype, spare)

    def copy() -> PointView:
        copy_point(shard, point, spare, dtype)
        return shard.view(spare)

    return writer.call(copy)


def _begin_copy(writer: Writer, point: Point, dtype: str, spare: Vector) -> asyncio.Future[PointView]:
    shard, loop, copying = writer.shard, asyncio.get_running_loop(), Copying()
    begun: asyncio.Future[PointView] = loop.create_future()

    def begin(view: PointView) -> None:
        if not begun.done():
            begun.set_result(view)

    def copy() -> None:
        loop.call_soon_threadsafe(begin, shard.view(spare, copying=copying))
        copy_point(shard, point, spare, dtype, copying.note)

    def end(done: asyncio.Future[None]) -> None:
        error = done.exception()
        copying.end(error)
        if error is not None and not begun.done():
            begun.set_exception(error)
            # Its reader may have left.
            begun.exception()

    writer.call(copy).add_done_callback(end)
    return begun
