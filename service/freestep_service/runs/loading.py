"""Loading of the shards that are owned here: from a checkpoint, an upload, the state that they hold, or none.

The law of this file: no shard loads anything but what was decided for all of them (`domain.opening`). It is called by
one task at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from freestep.errors import CheckpointNotFound, ShardUnavailable
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control, Orders
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.norm_history import NormHistory
from freestep_service.domain.opening import Decision
from freestep_service.domain.records import CheckpointId, Record, RunState
from freestep_service.domain.reports import Reported
from freestep_service.domain.run_view import RunView
from freestep_service.domain.tally import Tally
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.held_states import HeldStates
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.run_memory import RunMemory
from freestep_service.runs.stored_states import StoredStates
from freestep_service.storage.checkpoints import Checkpoints, LoadedState
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import remove_other_journals
from freestep_service.storage.part_manifest import part_name

__all__ = ["Loading"]

logger = logging.getLogger("freestep")


class Loading:
    """What the owned shards of one run load."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        memory: RunMemory,
        stored: StoredStates,
        checkpoints: Checkpoints,
        checkpointing: Checkpointing,
        held: HeldStates,
    ) -> None:
        self._prefetched: dict[tuple[CheckpointId, int, int], LoadedState] = {}
        self._context = context
        self._coordinator = context.coordinator
        self._disk = context.resources.disk
        self._recovery = recovery
        self._shards = shards
        self._memory = memory
        self._stored = stored
        self._checkpoints = checkpoints
        self._checkpointing = checkpointing
        self._held = held

    def note_durable(self, view: RunView) -> None:
        """Notes the newest checkpoint that Redis knows to be on disk."""
        self._checkpointing.note_durable(view)

    async def open(self, view: RunView, decision: Decision, durable: CheckpointId | None = None) -> bool:
        """Has all shards load what was decided; whether that is what they now do.

        durable: a checkpoint that all of them can be loaded from, for a Redis that knows of none.
        """
        checkpoint, opening = decision.cut, self._coordinator.opening
        group: dict[str, int] = {}
        reported: Reported = {}
        norm_history = NormHistory()
        data = DataSets()
        control = Control()
        receipts: dict[str, Record] = {}
        tally = self._context.telemetry.tally
        if decision.live:
            held = next((shard.core for shard in self._shards if shard.core.loaded is not None), None)
            if held is not None:
                _, _, group = await held.writer.run(held.shard.position)
                reported = await held.writer.run(held.shard.reported)
                norm_history = await held.writer.run(held.shard.norm_history)
                data = await held.writer.run(held.shard.data)
                control = await held.writer.run(held.shard.control)
                receipts = self._context.receipts.until(checkpoint.seq if checkpoint else 0)
                counted = await held.writer.run(held.shard.tally)
                tally = counted._replace(dropped=max(counted.dropped, tally.dropped))
        if decision.upload:
            held_state = self._held.find(decision.attempt)
            if held_state is None:
                raise ShardUnavailable("the state was held for too long")
            reported, data, control = held_state.reported, held_state.data, held_state.control
        elif decision.initialized and checkpoint is not None and not (receipts or group or reported or data or control):
            loaded = await self._load(checkpoint, 0, 0)
            if loaded is None and not decision.live:
                await opening.gather(self._shards.count, view.generation)
                return True
            if loaded is not None:
                state, receipts = loaded
                group, reported, norm_history = state.group, state.reported, state.norm_history
                data, control = state.data, state.control
                # Where nothing has been counted here, the checkpoint's writer has; of what was given up it knows less.
                decided = [state.tally] if decision.live else [state.tally, tally]
                tally = max(decided, key=lambda each: each.applied + each.accumulated)
        if _knows_later(view, decision):
            # Going back undoes what was computed, and not what an operator has said of the run.
            control = control.under(Orders.of(view.run))
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
            control=control,
        )
        target = {**decision.target(), "orders": control.orders.to_json()}
        policy = Policy.of(control.in_force(self._context.spec).aggregation)
        return await opening.open(opened, self._shards.count, view.generation, target, policy, durable)

    async def load(self, view: RunView, mine: Sequence[LocalShard]) -> bool:
        """Takes the state that was decided on; whether the run goes on to the next phase with that."""
        target, generation, opening = view.target(), view.generation, self._coordinator.opening
        checkpoint = None if target["cut"] is None else CheckpointId(*target["cut"])
        attempt = target.get("upload", "")
        orders = Orders(**target["orders"]) if "orders" in target else None
        epoch = view.number("epoch")
        initialized = view.number("initialized") == 1
        tally = Tally.of(view)
        opened = has_taken = has_loaded = False
        newest = max([shard.core.loaded or 0 for shard in mine], default=0)
        if newest > generation:
            # Redis went back behind an opening that has ended: what it decided on is behind what shards have since.
            await opening.gather(self._shards.count, generation, above=newest)
            return True
        await self._stored.note_epoch(epoch)
        for shard in mine:
            core = shard.core
            if core.loaded != generation:
                holds = target["live"] and core.loaded is not None
                source = None if holds else checkpoint
                if not await self._take(shard, source, epoch, attempt, orders, initialized=initialized, holds=holds):
                    await opening.gather(self._shards.count, generation)
                    return True
                await core.writer.run(core.shard.count_on, tally)
                core.loaded, has_taken = generation, True
                has_loaded |= source is not None and initialized
            elif view.field(core.index, "loaded") == str(generation):
                continue
            # Else Redis went back to before it was told.
            word = core.journal.word if core.journal is not None else ""
            if await opening.loaded(core.owner(), generation, word) == "open":
                opened = True
        if self._context.keeps_journal and has_loaded:
            parts = [self._context.manifest.part(index, view.count) for index in range(view.count)]
            names = [part_name(part.begin, part.end) for part in parts]
            directory = self._context.settings.journals() / self._context.name
            await self._disk.run(remove_other_journals, directory, names, epoch)
        if checkpoint is not None and has_loaded:
            self._checkpointing.went_back_to(None if attempt else checkpoint)
        self._stored.newest_epoch = max(self._stored.newest_epoch, epoch)
        step = self._shards.lowest.core.writer.applied_step if self._shards.lowest else view.number("step")
        if has_taken:
            # By what was changed of it, the run may take more memory than its spec says.
            await self._memory.count()
            # Whoever asked for an opening while this one was under way has it.
            self._recovery.reopened()
        if opened:
            logger.info("run %s is open: epoch %d, step %d", self._context.name, epoch, step)
        return opened

    async def _take(
        self,
        shard: LocalShard,
        checkpoint: CheckpointId | None,
        epoch: int,
        attempt: str,
        orders: Orders | None,
        *,
        initialized: bool,
        holds: bool,
    ) -> bool:
        """Brings a shard to a checkpoint, to its part of an upload, to the state it holds or to none.

        orders: what an operator has said of the run; None where an older version has decided on the opening.

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
                loaded = self._uploaded(attempt, core.index) if attempt else await self._load(checkpoint, begin, end)
                if loaded is None:
                    return False
                state, receipts = loaded
                if state.control:
                    await core.prepare(state.control.in_force(self._context.spec))
                await core.load(state, epoch)
                self._keep_receipts(receipts)
                seq, step = state.seq, state.step
                base = None if attempt else checkpoint
                if core.index == 0:
                    self._context.telemetry.resumed(state.tally)
            else:
                await core.load(None)
                self._context.receipts.clear()
        if journal is not None and holds and journal.epoch == epoch:
            journal.back_to(seq)
        elif journal is not None:
            await journal.begin(epoch, base, seq)
        if orders is not None:
            await writer.run(core.shard.operate, orders)
        core.closed = None
        core.is_repaired = False
        core.initialized = initialized
        if core.index == 0:
            await self._context.history.begin()
            self._context.events.begin(epoch, seq, step)
        writer.resume(epoch, seq, step)
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

    def _uploaded(self, attempt: str, index: int) -> LoadedState | None:
        part = self._held.take(attempt, index)
        return None if part is None else LoadedState(part, {})


def _knows_later(view: RunView, decision: Decision) -> bool:
    """Whether Redis has what was said of a run after the state that it goes back to."""
    if decision.live or "lost" in view.run:
        return False
    return decision.upload != "" or decision.cut is None or view.position >= (decision.cut.epoch, decision.cut.seq)
