"""Bodies of the whole model, which a process receives to send every shard its part.

The law of this file: however many come, they have the memory of one. Turns go by lease, so that no sender of many holds
up the others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from torch import Tensor

from freestep_service.optimizers import Quantized
from freestep_service.runs.context import RunContext
from freestep_service.runs.lanes import Lanes
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import uninterrupted
from freestep_service.state.staging import Body, Staging

__all__ = ["WholeBodies"]


class WholeBodies:
    """Those of one run."""

    def __init__(self, context: RunContext) -> None:
        resources, settings = context.resources, context.settings
        self.pool = VectorPool(context.manifest.numel, 1, reserve=resources.reserve)
        """The memory of one."""
        self._locks = resources.locks
        self._queue_s = settings.queue_seconds
        self._lanes = Lanes(1)
        self._staging = Staging(context.manifest, self.pool, resources.locks, settings.slow_bytes_per_second)

    @asynccontextmanager
    async def staged(
        self, body: Body, encodings: Collection[str] = ("dense",), lease: str = ""
    ) -> AsyncIterator[Tensor]:
        """A body of the whole model, flat [numel], fp32, or BF16 or F16 as it came; one at a time.

        lease: of whoever sends it; of those with the same, one waits for its turn among the others. Raises
        MalformedTensors, and Overloaded when others had their turns for too long.
        """
        await self._lanes.enter(lease, self._queue_s)
        try:
            vector = await self.pool.acquire(self._queue_s)
            staged = await self._staging.receive(body, vector, encodings)
        finally:
            self._lanes.leave(lease)
        try:
            whole = staged.tensors
            if isinstance(whole, Quantized):
                whole = await uninterrupted(self._locks.decoding(whole.decoded, 0, whole.numel(), vector.tensor()))
            yield whole
        finally:
            staged.hold.release()
