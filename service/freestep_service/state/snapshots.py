"""Points of a run as bodies ready to send: one per (step, point, dtype), shared by all who pull it.

A snapshot is immutable while anybody reads it. A run has two vectors for snapshots: when both are being sent, the
next pullers wait in line and then share one snapshot of the step that the run has reached by then, so slow
pullers cost neither memory nor training. y as fp32 is not copied but lent (`views`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from freestep.api.models import Point
from freestep_service.state.bodies import body, copy_point, room
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.compute import HOST
from freestep_service.state.shard import DTYPES
from freestep_service.state.views import Copying, PointView
from freestep_service.state.writer import Writer

__all__ = ["Reading", "Snapshot", "Snapshots", "take"]

VECTORS = 2
_LARGE = 1024 * 1024
"""Elements of which a copy takes longer than its beginning to be sent."""


@dataclass(frozen=True)
class Reading:
    """What is to be read: a point and its dtype.

    Of several shards, the cut that `ticket` names, which `readers` shards will be asked for. asked: whether the push
    that wants it has told Redis so. patience: then, how many seconds its group's update is waited for.
    """

    point: Point
    dtype: str
    ticket: str = ""
    readers: int = 1
    asked: bool = False
    patience: float | None = None


@dataclass
class Snapshot:
    """A point of one step, as a safetensors body: `header` and then `data`."""

    epoch: int
    step: int
    header: bytes
    data: memoryview
    view: PointView = field(repr=False)
    readers: int = 0
    seq: int | None = None
    """The place in the log that the point was cut at, where shards have to agree on it."""

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.header) + len(self.data)

    async def reach(self, size: int) -> None:
        """Returns when the first `size` bytes of the tensors are there. Raises what made their copy fail."""
        if self.view.copying is not None:
            await self.view.copying.reach(size)

    def slices(self, begin: int, end: int) -> tuple[memoryview, memoryview]:
        """Bytes `begin` to `end` of the body, those of the header and those of the tensors."""
        split = len(self.header)
        return (
            memoryview(self.header)[begin:end],
            self.data[max(begin - split, 0) : max(end - split, 0)],
        )


def take(writer: Writer, point: Point, dtype: str, spare: Vector) -> asyncio.Future[PointView]:
    """A point of the state that the writer's next entry finds, in the state's own memory or in `spare`.

    A large copy is there when it has begun.
    """
    shard = writer.shard
    if (point, dtype) == ("y", "F32"):
        return writer.call(shard.lend, spare)
    if dtype in DTYPES and shard.device == HOST and shard.manifest.numel >= _LARGE:
        return _begin(writer, point, dtype, spare)

    def copy() -> PointView:
        return PointView(*copy_point(shard, point, spare, dtype), spare)

    return writer.call(copy)


def _begin(writer: Writer, point: Point, dtype: str, spare: Vector) -> asyncio.Future[PointView]:
    shard, loop, copying = writer.shard, asyncio.get_running_loop(), Copying()
    begun: asyncio.Future[PointView] = loop.create_future()

    def begin(view: PointView) -> None:
        if not begun.done():
            begun.set_result(view)

    def copy() -> None:
        loop.call_soon_threadsafe(begin, PointView(shard.epoch, shard.step, spare, copying=copying))
        copy_point(shard, point, spare, dtype, copying.note)

    def end(done: asyncio.Future[None]) -> None:
        copying.end(done.exception())

    writer.call(copy).add_done_callback(end)
    return begun


class Snapshots:
    """The snapshots of one run."""

    def __init__(self, run: str, writer: Writer) -> None:
        self._run = run
        self._writer = writer
        manifest = writer.shard.manifest
        self._pool = VectorPool(manifest.numel, VECTORS, room(manifest), writer.shard.device)
        self._newest: dict[tuple[Point, str], Snapshot] = {}
        self._making: dict[tuple[Point, str], asyncio.Task[Snapshot]] = {}

    @asynccontextmanager
    async def read(self, point: Point, dtype: str) -> AsyncIterator[Snapshot]:
        """A snapshot of a step no older than the one the run has reached now, kept until the block ends."""
        snapshot = await self._acquire(point, dtype)
        try:
            yield snapshot
        finally:
            self._leave(snapshot)

    async def _acquire(self, point: Point, dtype: str) -> Snapshot:
        wanted = (self._writer.epoch, self._writer.applied_step)
        while True:
            newest = self._newest.get((point, dtype))
            if newest is None or (newest.epoch, newest.step) < wanted:
                newest = await self._make(point, dtype)
            if (newest.epoch, newest.step) >= wanted and self._newest.get((point, dtype)) is newest:
                newest.readers += 1
                return newest

    async def _make(self, point: Point, dtype: str) -> Snapshot:
        key = (point, dtype)
        if key not in self._making:
            self._making[key] = asyncio.create_task(self._copy(point, dtype))
        return await asyncio.shield(self._making[key])

    async def _copy(self, point: Point, dtype: str) -> Snapshot:
        key = (point, dtype)
        try:
            vector, manifest = await self._vector(key), self._writer.shard.manifest
            try:
                view = await take(self._writer, point, dtype, vector)
            except BaseException:
                self._pool.release(vector)
                raise
            header, data = body(view.vector, manifest, dtype, self._run, view.epoch, view.step, point)
            snapshot = Snapshot(view.epoch, view.step, header, data, view)
            if view.copying is not None:
                # Who copies needs the vector as long as any reader.
                snapshot.readers += 1
                view.copying.done.add_done_callback(lambda copied: self._copied(snapshot, copied))
            replaced, self._newest[key] = self._newest.get(key), snapshot
            if replaced is not None:
                self._let_go(replaced)
            return snapshot
        finally:
            del self._making[key]

    async def _vector(self, key: tuple[Point, str]) -> Vector:
        """A vector for a new snapshot, taken from one that nobody reads if there is no other."""
        vector = self._pool.try_acquire()
        if vector is not None:
            return vector
        # The key's own old snapshot first: it is the one that the new one replaces.
        for other in sorted(self._newest, key=lambda other: other != key):
            if self._newest[other].readers == 0:
                return self._newest.pop(other).view.end()
        return await self._pool.acquire()

    def _copied(self, snapshot: Snapshot, copied: asyncio.Future[None]) -> None:
        if copied.exception() is not None:
            self._newest = {key: newest for key, newest in self._newest.items() if newest is not snapshot}
        self._leave(snapshot)

    def _leave(self, snapshot: Snapshot) -> None:
        snapshot.readers -= 1
        self._let_go(snapshot)

    def _let_go(self, snapshot: Snapshot) -> None:
        if snapshot.readers:
            return
        key = next((key for key, newest in self._newest.items() if newest is snapshot), None)
        # What is lent is to be had again for nothing, and would have to be copied when the state moves on.
        if key is not None and not self._pool.contended and snapshot.view.is_copy:
            return
        if key is not None:
            del self._newest[key]
        self._pool.release(snapshot.view.end())
