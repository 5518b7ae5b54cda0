"""What a process counts in its memory budget for one run: what its shards there have, and what they are about to take.

The law of this file: what is counted is asked of those who have it, each time anew. More is counted before it may be
taken, and less once it has been given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from freestep.api.models import RunSpec
from freestep_service.domain.aggregation import Policy
from freestep_service.runs.context import RunContext
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.state.memory_budget import Vectors

__all__ = ["RunMemory"]


class RunMemory:
    """The memory of one run in this process."""

    def __init__(self, context: RunContext, shards: OwnedShards) -> None:
        self._context = context
        self._shards = shards
        self._coming: list[Policy] = []
        """Those that may soon be in force."""
        self._sizes: dict[tuple[int, int, Vectors], int] = {}
        """Bytes, by shards here, shards and vectors."""
        self._counted = 0
        self._turn = asyncio.Lock()
        self._closed = False

    @asynccontextmanager
    async def room_for(self, spec: RunSpec) -> AsyncIterator[None]:
        """A block in which the memory is counted too that a run takes by a spec, which may come to be in force by it.

        Raises InvalidSpec where that is not free; then nothing has changed.
        """
        policy = Policy.of(spec.aggregation)
        async with self._turn:
            size = await self._size(policy)
            if not self._closed:
                self._context.resources.memory.reserve(self._context.name, size)
                self._counted = size
            self._coming.append(policy)
        try:
            yield
        finally:
            self._coming.remove(policy)
            await self.count()

    def expect(self, spec: RunSpec, applied: asyncio.Future[None]) -> None:
        """Counts what a spec takes that is in force once an entry of the log is applied, or never where it is lost."""
        policy = Policy.of(spec.aggregation)

        def forget(_: asyncio.Future[None]) -> None:
            self._coming.remove(policy)
            self.recount()

        self._coming.append(policy)
        self.recount()
        applied.add_done_callback(forget)

    def recount(self) -> None:
        """Counts in the background."""
        if not self._closed:
            self._context.background.spawn(self.count(), "its memory was not counted")

    async def count(self) -> None:
        """Counts what is there; where that is more than is free, it is logged, and counted all the same."""
        async with self._turn:
            size = await self._size()
            if not self._closed and size != self._counted:
                self._context.resources.count(self._context.name, size, self._counted)
                self._counted = size

    async def _size(self, *others: Policy) -> int:
        """Bytes of what is there, and of what comes by the policies that may be in force, `others` among them."""
        context, shards = self._context, self._shards.count
        cores = [shard.core for shard in self._shards]
        policies = [*self._coming, *others]
        if not cores:
            # It is to have the memory for its share.
            policies.append(Policy.of(context.spec.aggregation))
        vectors = Vectors.most([*(core.vectors for core in cores), *(Vectors.of(each, shards) for each in policies)])
        here = max(context.resources.node.share(shards), len(cores))
        key = here, shards, vectors
        if key not in self._sizes:
            self._sizes[key] = await context.resources.bytes_of(context.spec, here, shards, vectors)
        return self._sizes[key]

    def close(self) -> None:
        """Counts nothing any more: the run is no more, or this process gives it up."""
        self._closed = True
