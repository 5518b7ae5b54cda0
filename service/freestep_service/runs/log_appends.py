"""Entries of the log that no push makes: reports of metrics, new data sets, changes of the run.

The law of this file: what is acknowledged, now or again, is in the log of a Redis that still has it, and in a journaled
run on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from freestep.errors import CoordinatorUnavailable, ShardUnavailable
from freestep_service.domain.records import LogPosition, Owner
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery

__all__ = ["LogAppends"]

T = TypeVar("T")

_POLL_S = 0.01
_BEGINNING = LogPosition(0, 0)


class LogAppends:
    """The appends to the log of one run, by the owner of a shard of it."""

    def __init__(self, recovery: Recovery, shards: OwnedShards, dispatch: Dispatch) -> None:
        self._recovery = recovery
        self._shards = shards
        self._dispatch = dispatch

    async def append(self, ask: Callable[[Owner], Awaitable[tuple[T, dict[str, Any] | None]]]) -> tuple[T, bool]:
        """What Redis answers, and whether it has appended an entry; without one, what was asked for was there before.

        ask: asks Redis on behalf of a shard's owner; returns its answer, and the entry if there is one. Raises what
        `ask` raises, ShardUnavailable, and StorageUnavailable where it may have counted and is not on disk.
        """

        async def asked() -> tuple[T, dict[str, Any] | None, bool]:
            core = self._shards.require_any().core
            era = core.writer.era
            answer, entry = await ask(core.owner())
            return answer, entry, era == core.writer.era

        while True:
            try:
                answer, entry, holds = await self._recovery.call(asked)
            except CoordinatorUnavailable:
                self._recovery.catch_up()
                raise
            # Else it is the answer of a Redis that has lost it since.
            if holds:
                break
        if entry is not None:
            self._dispatch.on_entry(entry)
        await self.on_disk()
        return answer, entry is not None

    async def on_disk(self, place: LogPosition = _BEGINNING) -> None:
        """Returns when the log up to a place, and what else is known of it, is in the journals here.

        Other shards have it then, or learn of it. Raises StorageUnavailable, and ShardUnavailable where the run has
        been opened again without it.
        """
        for shard in self._shards:
            journal, writer = shard.core.journal, shard.core.writer
            if journal is None:
                continue
            known, generation = max(writer.position, place), shard.core.loaded
            while writer.epoch == known.epoch and writer.taken_seq < known.seq:
                if shard.core.loaded != generation and writer.position < known:
                    raise ShardUnavailable("the run was opened again before it was on disk")
                await journal.flush()
                # An entry before it may be on its way.
                await asyncio.sleep(_POLL_S if writer.taken_seq < known.seq else 0)
