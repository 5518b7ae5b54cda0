"""The state of the shards that are owned here: where they stand, which state they load, and what they leave on disk.

The law of this file: no shard reports or leaves its state before it has taken all of the log that there is, and none
loads anything but what was decided for all of them (`domain.opening`). It is called by one task at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any

from freestep.errors import (
    CheckpointNotFound,
    CoordinatorUnavailable,
    FreestepError,
    ShardUnavailable,
    StorageUnavailable,
)
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.norm_history import NormHistory
from freestep_service.domain.opening import Decision, Exchange, Report, Waiting, decide, exchange
from freestep_service.domain.records import CheckpointId, Fenced, LogPosition, LogTruncated, Record, RunState
from freestep_service.domain.reports import Reported
from freestep_service.domain.run_view import RunView
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.held_states import HeldStates
from freestep_service.runs.journaled_opening import exchange_entries, go_back, settle
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery
from freestep_service.storage.checkpoints import Checkpoints, LoadedState
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import is_journal_here, remove_other_journals
from freestep_service.storage.part_manifest import part_name
from freestep_service.storage.run_files import RunFile

__all__ = ["Loading"]

logger = logging.getLogger("freestep")

_CATCHING_UP_S = 3.0
"""Seconds for which a shard that stops for an opening waits for entries of the log that it has not got."""
_POLL_S = 0.05


class Loading:
    """What the owned shards of one run report, load and leave."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        checkpoints: Checkpoints,
        checkpointing: Checkpointing,
        held: HeldStates,
    ) -> None:
        self.newest_epoch = 0
        """The newest in which a shard has loaded its state."""
        self.problem: str | None = None
        """Why the last division into other shards failed here."""
        self._prefetched: dict[tuple[CheckpointId, int, int], LoadedState] = {}
        self._context = context
        self._coordinator = context.coordinator
        self._disk = context.resources.disk
        self._recovery = recovery
        self._shards = shards
        self._checkpoints = checkpoints
        self._checkpointing = checkpointing
        self._held = held

    # Gather

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
        return await self.open(view, decision)

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
            newest = max(view.number("epoch"), self.newest_epoch, (await self._stored())[0])
            await settle(self._context, self._checkpoints, shard, newest)
            if core.loaded is not None and asked is not None and asked.goes_back:
                await go_back(self._context, self._checkpoints, self._checkpointing, shard, newest, asked.seq)
                return Report(newest, core.initialized, offers=await self.offers(core.index, self._shards.count))
        is_lost = "lost" in view.run or (view.number("epoch"), view.number("seq")) < writer.position
        if core.loaded is not None:
            if is_lost:
                writer.pause(forget=True)
            elif core.initialized and view.number("epoch") == writer.epoch:
                await self._take_all(shard, view.number("seq"))
            seq, step, _ = await writer.run(core.shard.position)
            live = CheckpointId(writer.epoch, step, seq)
            if asked is not None:
                live, entries = await exchange_entries(self._context, shard, view, is_paused=is_lost)
            is_there = is_lost or (live.epoch, live.seq) == (view.number("epoch"), view.number("seq"))
            if not is_there and (core.journal is None or live.epoch != view.number("epoch")):
                # Entries of the log are missing here: from there it cannot go on.
                live = core.loaded = None
            elif view.number("resharding") and core.initialized:
                problem = await self._write(shard, live)
        begin, end = core.manifest.begin, core.manifest.end
        offers: list[CheckpointId] = []
        if self._context.keeps_checkpoints:
            offers = await self.offers(core.index, self._shards.count)
            if live is None:
                closed = core.closed = core.closed or await self._take_closed(begin, end)
            if core.journal is not None and live is None and closed is None and offers and "recut" not in view.run:
                logger.error(
                    "run %s: shard %d has no journal here: what was acknowledged since its newest checkpoint is lost",
                    self._context.name, core.index,
                )  # fmt: skip
        epoch = max(self.newest_epoch, writer.epoch, (await self._stored())[0])
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
        await self._coordinator.log.part_written(shard.core.owner(), identity, size)
        return None

    async def offers(self, index: int, count: int) -> list[CheckpointId]:
        """The checkpoints that a shard could be loaded from here, oldest first."""
        part = self._context.manifest.part(index, count)
        return await self._disk.run(self._checkpoints.offers, part.begin, part.end)

    def note_durable(self, view: RunView) -> None:
        """Notes the newest checkpoint that Redis knows to be on disk."""
        self._checkpointing.note_durable(view)

    async def why_unreadable(self, index: int, count: int) -> str | None:
        """Why a shard that is in a checkpoint cannot be loaded here; None where it can."""
        try:
            if await self.offers(index, count):
                return None
        except StorageUnavailable as error:
            return str(error)
        return (
            f"the storage {self._context.resources.storage} holds no checkpoint of it, though there was one: "
            "bring the files back, or delete the run"
        )

    async def why_without_journal(self, index: int, view: RunView, missing_s: float) -> str | None:
        """Why a shard is left to whoever has its journal; None where that is here, or nothing can be lost without it.

        missing_s: seconds for which the shard has had no owner.
        """
        context, wait = self._context, self._context.settings.journal_wait_seconds
        if not context.keeps_journal or "recut" in view.run or missing_s >= wait:
            return None
        # Without other services, whatever is here is the newest.
        epoch = max(view.number("epoch"), await self.last_epoch()) if context.settings.redis_url else 1
        part = context.manifest.part(index, view.count)
        directory = context.settings.journals() / context.name / part_name(part.begin, part.end)
        if await self._disk.run(is_journal_here, directory, view.field(index, "journal"), epoch):
            return None
        offers = await self.offers(index, view.count)
        closed = await self._disk.run(self._checkpoints.closed, part.begin, part.end)
        if not offers or closed is not None:
            return None
        host = (view.field(index, "host") or "").partition(" ")[0]
        patience = "as long as it takes" if wait == inf else f"for {wait:g} s, and then goes back to that checkpoint"
        return (
            f"its journal, with what was acknowledged since the checkpoint of step {offers[-1].step}, is not in "
            f"{directory.parent} here: start the service{f' on the host {host}' if host else ''} that wrote it, or "
            f"bring the directory here; the run waits {patience} (journal_wait_seconds)"
        )

    async def last_epoch(self) -> int:
        """The newest epoch that is known here or in storage."""
        stored, _ = await self._stored()
        return max(self._shards.epoch, self.newest_epoch, stored)

    async def _stored(self) -> tuple[int, int]:
        """The epoch and the number of shards that storage knows of."""
        try:
            file = await self._disk.run(RunFile.read, self._context.resources.storage, self._context.name)
        except (FileNotFoundError, Damaged, StorageUnavailable):
            return 0, 0
        return file.epoch, file.shards

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

    # Load

    async def open(self, view: RunView, decision: Decision) -> bool:
        """Has all shards load what was decided; whether that is what they now do."""
        checkpoint, opening = decision.cut, self._coordinator.opening
        group: dict[str, int] = {}
        reported: Reported = {}
        norm_history = NormHistory()
        data = DataSets()
        receipts: dict[str, Record] = {}
        tally = self._context.telemetry.tally
        if decision.live:
            held = next((shard.core for shard in self._shards if shard.core.loaded is not None), None)
            if held is not None:
                _, _, group = await held.writer.run(held.shard.position)
                reported = await held.writer.run(held.shard.reported)
                norm_history = await held.writer.run(held.shard.norm_history)
                data = await held.writer.run(held.shard.data)
                receipts = self._context.receipts.until(checkpoint.seq if checkpoint else 0)
        if decision.upload:
            held_state = self._held.find(decision.upload)
            if held_state is None:
                raise ShardUnavailable("the state was held for too long")
            reported, data = held_state.reported, held_state.data
        elif decision.initialized and checkpoint is not None and not (receipts or group or reported or data):
            loaded = await self._load(checkpoint, 0, 0)
            if loaded is None and not decision.live:
                await opening.gather(self._shards.count, view.generation)
                return True
            if loaded is not None:
                state, receipts = loaded
                group, reported, norm_history = state.group, state.reported, state.norm_history
                data = state.data
                # Where nothing has been counted here, the checkpoint's writer has.
                tally = max(tally, state.tally, key=lambda each: sum(each.pushes.values()))
        place = checkpoint or CheckpointId(decision.epoch, 0, 0)
        opened = RunState(
            decision.epoch,
            place.step,
            place.seq,
            decision.initialized,
            group,
            receipts,
            reported,
            pushes=tally.pushes,
            norm_history=norm_history,
            data=data,
        )
        return await opening.open(opened, self._shards.count, view.generation, decision.target())

    async def load(self, view: RunView, mine: Sequence[LocalShard]) -> bool:
        """Takes the state that was decided on; whether the run goes on to the next phase with that."""
        target, generation, opening = view.target(), view.generation, self._coordinator.opening
        checkpoint = None if target["cut"] is None else CheckpointId(*target["cut"])
        upload = target.get("upload", "")
        epoch = view.number("epoch")
        initialized = view.number("initialized") == 1
        opened = has_taken = has_loaded = False
        await self._write_run_file(epoch)
        for shard in mine:
            core = shard.core
            if core.loaded == generation:
                continue
            holds = target["live"] and core.loaded is not None
            source = None if holds else checkpoint
            if not await self._take(shard, source, epoch, upload, initialized=initialized, holds=holds):
                await opening.gather(self._shards.count, generation)
                return True
            core.loaded, has_taken = generation, True
            has_loaded |= source is not None and initialized
            word = core.journal.word if core.journal is not None else ""
            if await opening.loaded(core.owner(), generation, word) == "open":
                opened = True
        if self._context.keeps_journal and has_loaded:
            parts = [self._context.manifest.part(index, view.count) for index in range(view.count)]
            names = [part_name(part.begin, part.end) for part in parts]
            directory = self._context.settings.journals() / self._context.name
            await self._disk.run(remove_other_journals, directory, names, epoch)
        if checkpoint is not None and has_loaded:
            self._checkpointing.went_back_to(None if upload else checkpoint)
        self.newest_epoch = max(self.newest_epoch, epoch)
        step = self._shards.lowest.core.writer.applied_step if self._shards.lowest else view.number("step")
        self._context.telemetry.at(epoch, step)
        if has_taken:
            # Whoever asked for an opening while this one was under way has it.
            self._recovery.reopened()
        if opened:
            logger.info("run %s is open: epoch %d, step %d", self._context.name, epoch, step)
        return opened

    async def _write_run_file(self, epoch: int) -> None:
        """Notes the epoch in storage. Where that fails the run opens all the same: checkpoints hold their epochs."""
        if await self._stored() == (epoch, self._shards.count):
            return
        file = RunFile(self._context.canonical_spec, epoch, self._shards.count, *self._context.origin)
        try:
            await self._disk.run(file.write, self._context.resources.storage, self._context.name)
        except FreestepError as error:
            logger.warning("run %s: its run file was not written: %s", self._context.name, error)

    async def _take(
        self,
        shard: LocalShard,
        checkpoint: CheckpointId | None,
        epoch: int,
        upload: str,
        *,
        initialized: bool,
        holds: bool,
    ) -> bool:
        """Brings a shard to a checkpoint, to its part of an upload, to the state it holds or to none.

        False where the checkpoint is damaged, or the part is not held here.
        """
        core, writer, journal = shard.core, shard.core.writer, shard.core.journal
        begin, end = core.manifest.begin, core.manifest.end
        base: CheckpointId | None = None
        await core.prepare()
        if holds:
            seq, step, _ = await writer.run(core.shard.position)
            self._keep_receipts(self._context.receipts.until(seq))
        else:
            writer.pause()
            seq, step = 0, 0
            if checkpoint is not None and initialized:
                loaded = self._uploaded(upload, core.index) if upload else await self._load(checkpoint, begin, end)
                if loaded is None:
                    return False
                state, receipts = loaded
                await writer.load(core.shard.load, state, epoch)
                self._keep_receipts(receipts)
                seq, step = state.seq, state.step
                base = None if upload else checkpoint
                if core.index == 0:
                    self._context.telemetry.resumed(state.tally)
            else:
                await writer.load(core.shard.clear)
                self._context.receipts.clear()
        if journal is not None and holds and journal.epoch == epoch:
            journal.back_to(seq)
        elif journal is not None:
            await journal.begin(epoch, base, seq)
        core.closed = None
        core.is_repaired = False
        core.initialized = initialized
        if core.index == 0:
            self._context.events.begin(epoch, seq, step)
        writer.resume(epoch, seq, step)
        if core.index == 0:
            self._context.telemetry.restored(await writer.run(core.shard.reported))
        if not initialized:
            # Entries wait until the weights are there.
            writer.pause()
        return True

    def _keep_receipts(self, receipts: dict[str, Record]) -> None:
        self._context.receipts.clear()
        self._context.receipts.update(receipts)

    async def prefetch(self, identity: CheckpointId) -> None:
        """Reads a checkpoint for the shards here, before anything is changed. Raises CheckpointNotFound if damaged."""
        for shard in self._shards:
            stretch = shard.core.manifest.begin, shard.core.manifest.end
            try:
                self._prefetched[identity, *stretch] = await self._disk.run(self._checkpoints.load, identity, *stretch)
            except Damaged as error:
                detail = f"the checkpoint of step {identity.step} is damaged: {error}"
                raise CheckpointNotFound(detail, step=identity.step) from None

    def forget_prefetched(self) -> None:
        """Gives back the memory of what was read and is not needed."""
        self._prefetched.clear()

    async def _load(self, identity: CheckpointId, begin: int, end: int) -> LoadedState | None:
        if prefetched := self._prefetched.pop((identity, begin, end), None):
            return prefetched
        try:
            return await self._disk.run(self._checkpoints.load, identity, begin, end)
        except Damaged:
            return None

    def _uploaded(self, upload: str, index: int) -> LoadedState | None:
        part = self._held.take(upload, index)
        return None if part is None else LoadedState(part, {})

    # Leave

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
