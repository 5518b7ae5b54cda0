"""A shard's part of a checkpoint for those who read it while the run goes on: of a point, or of the whole state.

Nothing is sent before the checksums of all that was read were compared. So what is wanted is read into memory, which is
counted in the process's budget and given back when it has been sent; and readers take turns, so that they leave the
disk's threads to those who write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from freestep.api.models import Point
from freestep.errors import CheckpointNotFound, Overloaded
from freestep.wire.header import data_length
from freestep_service.domain.records import CheckpointId
from freestep_service.optimizers import method_of
from freestep_service.runs.context import RunContext
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.bodies import body, copy_point
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import uninterrupted
from freestep_service.state.copied_state import CopiedState, vectors_of
from freestep_service.state.shard import StateCopy
from freestep_service.state.snapshots import PointBody
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged

__all__ = ["CheckpointReads"]


class CheckpointReads:
    """The reads of one shard's part of the checkpoints that are kept."""

    def __init__(self, context: RunContext, core: ShardCore, checkpoints: Checkpoints) -> None:
        self._name = context.name
        self._spec = context.spec
        self._disk = context.resources.disk
        self._locks = context.resources.locks
        self._budget = context.resources.memory
        self._patience_s = context.settings.queue_seconds
        self._manifest = core.manifest
        self._checkpoints = checkpoints

    async def find(self, step: int) -> CheckpointId:
        """The checkpoint of a step, of the newest epoch that has one. Raises CheckpointNotFound, StorageUnavailable."""
        return await self._disk.run(self._checkpoints.at, step)

    @asynccontextmanager
    async def point(self, checkpoint: CheckpointId, point: Point, dtype: str) -> AsyncIterator[PointBody]:
        """A point of the checkpoint; its memory is given back when the block ends.

        Raises CheckpointNotFound where it is damaged or dropped meanwhile, StorageUnavailable, and Overloaded where
        there is no memory for it, or others read for too long.
        """
        manifest, wanted = self._manifest, vectors_of(self._spec, point)
        async with AsyncExitStack() as memory:
            async with self._turn():
                vector = memory.enter_context(self._vector(dtype))
                with self._counted(self._bytes(wanted)):
                    rates = await self._write(checkpoint, wanted, point, dtype, vector)
            header, data = body(vector, manifest, dtype, self._name, checkpoint.epoch, checkpoint.step, point)
            yield PointBody(checkpoint.epoch, checkpoint.step, header, data, seq=checkpoint.seq, scheduled_lr=rates)

    @asynccontextmanager
    async def state(self, checkpoint: CheckpointId) -> AsyncIterator[StateCopy]:
        """The state vectors and all scalars, otherwise as `point`; without what an unfinished update has gathered."""
        wanted = method_of(self._spec.optimizer).buffers
        async with AsyncExitStack() as memory:
            async with self._turn():
                memory.enter_context(self._counted(self._bytes(wanted)))
                copy = await self._load(checkpoint, wanted)
            yield copy

    async def _write(
        self, checkpoint: CheckpointId, wanted: Collection[str], point: Point, dtype: str, vector: Vector
    ) -> tuple[float, ...] | None:
        """Writes a point into a vector; the learning rates of its step. What it is written from is left to nobody."""
        copy = await self._load(checkpoint, wanted)

        def write() -> tuple[float, ...] | None:
            state = CopiedState(self._spec, self._manifest, copy)
            copy_point(state, point, vector, dtype)
            return state.scheduled_lr

        return await uninterrupted(self._locks.decoding(write))

    async def _load(self, checkpoint: CheckpointId, wanted: Collection[str]) -> StateCopy:
        begin, end = self._manifest.begin, self._manifest.end
        reading = self._disk.run(self._checkpoints.load, checkpoint, begin, end, wanted)
        try:
            return (await uninterrupted(asyncio.ensure_future(reading))).state
        except Damaged as error:
            detail = f"the checkpoint of step {checkpoint.step} is damaged or has been dropped: {error}"
            raise CheckpointNotFound(detail, step=checkpoint.step) from None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._disk.readers.acquire()
        except TimeoutError:
            raise Overloaded("others read checkpoints") from None
        try:
            yield
        finally:
            self._disk.readers.release()

    @contextmanager
    def _vector(self, dtype: str) -> Iterator[Vector]:
        room = data_length(self._manifest, dtype)
        with self._counted(max(4 * self._manifest.numel, room)):
            yield Vector(self._manifest.numel, room)

    @contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        if not self._budget.try_reserve(size):
            free = self._budget.free
            raise Overloaded(f"what is read of the checkpoint takes {size} bytes of memory, and {free} are free")
        try:
            yield
        finally:
            self._budget.release(size)

    def _bytes(self, vectors: Collection[str]) -> int:
        return 4 * self._manifest.numel * len(vectors)
