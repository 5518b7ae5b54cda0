"""What a shard tells the others of the distances between an update's pushes, and hears of theirs.

Under `krum` an update is made of the pushes that are nearest to the others, as whole gradients, of which a shard has
parts. Each reports its part of the squared distances to Redis, and all make the update with the sum.

The law of this file: a report is repeated until its update is made or lost. So a message that was not heard, a report
that Redis has lost and a token that has changed need no other remedy. A shard that has made the update reports once
more where another asks for it, who had not heard the parts before Redis lost them.
"""

from __future__ import annotations

import asyncio

from torch import Tensor

from freestep.errors import CoordinatorUnavailable
from freestep_service.domain.records import Behind, Fenced
from freestep_service.runs.background import Background
from freestep_service.runs.context import RunContext
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.log import Entry

__all__ = ["DistanceReports"]

_KEPT = 2
"""Parts that are kept: of the update that others may have yet to make, and of the next, for which this shard waits."""
_SILENCE_S = 1.0
"""Seconds for which a message is listened for before Redis is asked for what it would say."""


class DistanceReports:
    """The reports of one shard."""

    def __init__(self, context: RunContext, recovery: Recovery, core: ShardCore) -> None:
        self._log = context.coordinator.log
        self._recovery = recovery
        self._core = core
        # Of its own: they end with the shard's writer, for which the run's do not wait.
        self._background = Background(f"run {context.name}, shard {core.index}")
        self._parts: dict[tuple[int, int], Tensor] = {}
        """This shard's parts of the newest updates, by epoch and seq."""
        core.writer.on_measured = self._begin

    def repeat(self, epoch: int, seq: int) -> None:
        """Reports this shard's part of an update once more, if it is kept."""
        if (part := self._parts.get((epoch, seq))) is not None:
            self._background.spawn(self._report_once(epoch, seq, part), "distances were not reported again")

    def _begin(self, entry: Entry, part: Tensor, applied: asyncio.Future[None]) -> None:
        self._parts[entry.epoch, entry.seq] = part
        while len(self._parts) > _KEPT:
            del self._parts[next(iter(self._parts))]
        self._background.spawn(self._report(entry, part, applied), "an update was not made")

    async def _report(self, entry: Entry, part: Tensor, applied: asyncio.Future[None]) -> None:
        """applied: the outcome of the entry that makes the update."""
        while not applied.done():
            await self._report_once(entry.epoch, entry.seq, part)
            await asyncio.wait([applied], timeout=_SILENCE_S)

    async def _report_once(self, epoch: int, seq: int, part: Tensor) -> None:
        try:
            distances = await self._log.report_distances(self._core.owner(), seq, part)
        except CoordinatorUnavailable:
            pass
        except Behind:
            self._recovery.reopen("Redis has lost what its shards have seen")
        except Fenced:
            self._recovery.fenced()
        else:
            if distances is not None:
                self._core.writer.add_distances(epoch, seq, distances)

    async def close(self) -> None:
        """Returns when none is under way any more; the writer is closed."""
        await self._background.settle()
