"""Where the shards that are owned here stand: what they report when the run is gathered, and leave when they go.

The law of this file: no shard reports or leaves its state before it has taken all of the log that there is. It is
called by one task at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from freestep.errors import CoordinatorUnavailable, FreestepError, StorageUnavailable
from freestep_service.domain.opening import Exchange, Report, Waiting, common_checkpoint, decide, exchange
from freestep_service.domain.records import CheckpointId, Fenced, LogPosition, LogTruncated
from freestep_service.domain.run_view import RunView
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.journaled_opening import exchange_entries, go_back, settle
from freestep_service.runs.loading import Loading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.stored_states import StoredStates
from freestep_service.storage.checkpoints import Checkpoints

__all__ = ["Standing"]

logger = logging.getLogger("freestep")

_CATCHING_UP_S = 3.0
"""Seconds for which a shard that stops for an opening waits for entries of the log that it has not got."""
_POLL_S = 0.05


class Standing:
    """What the owned shards of one run report and leave."""

    def __init__(
        self,
        context: RunContext,
        shards: OwnedShards,
        stored: StoredStates,
        loading: Loading,
        checkpoints: Checkpoints,
        checkpointing: Checkpointing,
    ) -> None:
        self.problem: str | None = None
        """Why the last division into other shards failed here."""
        self._context = context
        self._coordinator = context.coordinator
        self._disk = context.resources.disk
        self._shards = shards
        self._stored = stored
        self._loading = loading
        self._checkpoints = checkpoints
        self._checkpointing = checkpointing

    async def report(self, view: RunView, mine: Sequence[LocalShard]) -> bool:
        """Reports where the owned shards stand; whether the run goes on to the next phase with that."""
        reports, opening = None, self._coordinator.opening
        for shard in mine:
            report = await self._stand(shard, view)
            reports = await opening.report_shard(shard.core.owner(), view.generation, report.to_json())
        if reports is None:
            return False
        parsed = [Report.from_json(report) for report in reports]
        if shards := view.number("resharding"):
            if problem := next((report.problem for report in parsed if report.problem), None):
                logger.error("run %s is not divided into %d shards: %s", self._context.name, shards, problem)
                await opening.gather(self._shards.count, view.generation, resharding=0)
                return True
            places = {(report.live, report.initialized) for report in parsed}
            if len(places) == 1 and parsed[0].live is not None:
                await opening.reshard(view.generation, shards)
                return True
        if (wanted := exchange(view, parsed)) is not None:
            if wanted.goes_back:
                logger.error(
                    "run %s: a repair has given up entries: it goes on at entry %d, the newest that all shards have, "
                    "in a new epoch",
                    self._context.name, wanted.seq,
                )  # fmt: skip
            await opening.gather(self._shards.count, view.generation, exchange=wanted)
            return True
        try:
            decision = decide(view, parsed)
        except Waiting as reason:
            logger.error("run %s cannot be opened: %s", self._context.name, reason)
            return False
        return await self._loading.open(view, decision, common_checkpoint(parsed))

    async def _stand(self, shard: LocalShard, view: RunView) -> Report:
        """Where a shard stands, once it has taken what there is of the log."""
        core, writer = shard.core, shard.core.writer
        live, closed, problem = None, None, None
        entries: list[dict[str, Any]] = []
        asked = Exchange.of(view) if core.journal is not None else None
        if shard.has_failed:
            # Its state may be half changed, or not what is on disk.
            core.loaded = None
        if core.journal is not None:
            newest = max(view.number("epoch"), self._stored.newest_epoch, (await self._stored.recorded())[0])
            await settle(self._context, self._checkpoints, shard, newest)
            if core.loaded is not None and asked is not None and asked.goes_back:
                await go_back(self._context, self._checkpoints, self._checkpointing, shard, newest, asked.seq)
                return Report(
                    newest, core.initialized, offers=await self._stored.offers(core.index, self._shards.count)
                )
        is_lost = "lost" in view.run or view.position < writer.position
        if core.loaded is not None:
            if is_lost:
                writer.pause(forget=True)
            elif core.initialized and view.number("epoch") == writer.epoch:
                await self._take_all(shard, view.number("seq"))
            seq, step, _ = await writer.run(core.shard.position)
            live = CheckpointId(writer.epoch, step, seq)
            if asked is not None:
                live, entries = await exchange_entries(self._context, shard, view, is_paused=is_lost)
            is_there = is_lost or (live.epoch, live.seq) == view.position
            if not is_there and (core.journal is None or live.epoch != view.number("epoch")):
                # Entries of the log are missing here: from there it cannot go on.
                live = core.loaded = None
            elif view.number("resharding") and core.initialized:
                problem = await self._write(shard, live)
        begin, end = core.manifest.begin, core.manifest.end
        offers: list[CheckpointId] = []
        if self._context.keeps_checkpoints:
            offers = await self._stored.offers(core.index, self._shards.count)
            if live is None:
                closed = core.closed = core.closed or await self._take_closed(begin, end)
            if core.journal is not None and live is None and closed is None and offers and "recut" not in view.run:
                logger.error(
                    "run %s: shard %d has no journal here: what was acknowledged since its newest checkpoint is lost",
                    self._context.name, core.index,
                )  # fmt: skip
        epoch = max(self._stored.newest_epoch, writer.epoch, (await self._stored.recorded())[0])
        is_journaled, is_repaired = core.journal is not None, live is not None and core.is_repaired
        return Report(epoch, core.initialized, live, closed, offers, problem, is_journaled, is_repaired, entries)

    async def _take_closed(self, begin: int, end: int) -> LogPosition | None:
        """Where an orderly shutdown left a shard.

        The record is removed before it counts: where it outlived the opening, the next would take the run for being
        there still, and go on in the same epoch without what came after.
        """
        left = await self._disk.run(self._checkpoints.closed, begin, end)
        if left is None:
            return None
        try:
            await self._disk.run(self._checkpoints.clear_closed, begin, end)
        except StorageUnavailable as error:
            logger.warning("run %s goes on in a new epoch: %s", self._context.name, error)
            return None
        return LogPosition(*left)

    async def _write(self, shard: LocalShard, identity: CheckpointId) -> str | None:
        """Writes a shard's state, for others to take; why that failed, if it did."""
        self.problem = None
        try:
            size = await self._checkpointing.write(shard, await shard.core.writer.run(shard.core.shard.copy_state))
        except FreestepError as error:
            self.problem = str(error)
            return self.problem
        if shard.index == 0:
            await self._context.history.save()
        await self._coordinator.log.part_written(shard.core.owner(), identity, size)
        return None

    async def leave(self, shard: LocalShard, view: RunView | None) -> None:
        """Closes a shard's pushes and leaves its state on disk; `view`: None where Redis cannot be reached."""
        core, writer = shard.core, shard.core.writer
        begin, end = core.manifest.begin, core.manifest.end
        if core.closed is not None:
            # It has not been opened here since.
            await self._disk.run(self._checkpoints.mark_closed, begin, end, *core.closed)
        if core.initialized and view is not None and view.number("epoch") == writer.epoch:
            await self._take_all(shard, view.number("seq"))
        # What Redis has not decided by now it will not, or, where it cannot be reached, nobody knows.
        settled = await shard.close_pushes() or view is not None
        if not core.initialized or not self._context.keeps_checkpoints:
            return
        copy = await writer.run(core.shard.copy_state)
        size = await self._checkpointing.write(shard, copy)
        identity = CheckpointId(copy.epoch, copy.step, copy.seq)
        durable = not self._shards.is_sharded
        with suppress(CoordinatorUnavailable, Fenced):
            durable = await self._coordinator.log.part_written(core.owner(), identity, size) or durable
        if durable:
            await self._disk.run(self._checkpoints.complete, identity)
        if settled and copy.seq == writer.position.seq:
            await self._disk.run(self._checkpoints.mark_closed, begin, end, copy.epoch, copy.seq)

    async def _take_all(self, shard: LocalShard, seq: int) -> None:
        """Has a shard take the log up to an entry, or as much of it as there is."""
        with suppress(TimeoutError, LogTruncated):
            async with asyncio.timeout(_CATCHING_UP_S):
                while shard.core.writer.taken_seq < seq:
                    writer = shard.core.writer
                    entries = await self._coordinator.log.entries(LogPosition(writer.epoch, writer.taken_seq))
                    if not all([shard.take_entry(entry) for entry in entries]):
                        return
                    await asyncio.sleep(_POLL_S)
