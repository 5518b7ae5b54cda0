"""When and how a run's checkpoints are written: by its one shard, or by all shards, each its part of one state."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace

from freestep.api.models import Checkpoint
from freestep.errors import CoordinatorUnavailable, FreestepError, RunNotInitialized, ShardUnavailable
from freestep_service.domain.control import Control
from freestep_service.domain.records import CheckpointId, Fenced
from freestep_service.domain.run_view import RunView
from freestep_service.domain.tally import Tally
from freestep_service.runs.context import RunContext
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checkpoints import Checkpoints

__all__ = ["Checkpointing"]

logger = logging.getLogger("freestep")

_PAUSE_AFTER_FAILURE_S = 10.0
"""Seconds before a checkpoint that could not be written, on a full disk say, is tried again in the background."""
_OTHERS_S = 20.0
"""Seconds for which a checkpoint is waited for that other processes write."""
_POLL_S = 1.0
"""Seconds for which a message is listened for before Redis is asked."""


class Checkpointing:
    """The checkpoints of one run in the making."""

    def __init__(self, context: RunContext, recovery: Recovery, shards: OwnedShards, checkpoints: Checkpoints) -> None:
        self.lock = asyncio.Lock()
        """Held while one is being written."""
        self.failure: str | None = None
        """What the newest checkpoint could not be written for; None once one has been."""
        self.control: Control | None = None
        """What is changed of the run in the newest checkpoint; None where this process has not written of it."""
        self._context = context
        self._background = context.background
        self._coordinator = context.coordinator
        self._disk = context.resources.disk
        self._recovery = recovery
        self._shards = shards
        self._checkpoints = checkpoints
        self._last: tuple[int | None, float] = (None, time.monotonic())
        self._not_before = 0.0
        self._durable: dict[CheckpointId, asyncio.Future[None]] = {}
        self._written: tuple[CheckpointId, Control] | None = None
        """The newest that this process has written, or a part of it, and what is changed of the run in it."""

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint that this process knows of."""
        return self._last[0]

    def went_back_to(self, checkpoint: CheckpointId | None) -> None:
        """The run goes on from a checkpoint, or from a state that has none yet."""
        self._last = (checkpoint.step if checkpoint else None, time.monotonic())
        self.control = self._written = None

    def _note(self, written: CheckpointId) -> None:
        """A checkpoint is complete."""
        self.failure = None
        if written.epoch < self._shards.epoch:
            # The run went back while it was being written: what follows is not in it.
            return
        self._last = (written.step, time.monotonic())
        if self._written is not None and self._written[0] == written:
            self.control = self._written[1]

    def is_due(self) -> bool:
        """Whether it is for this process to have a checkpoint written, and time.

        It is where one could not be written, after enough steps, or after enough time with any step in it.
        """
        steps, settings = self._uncovered_steps(), self._context.settings
        if steps is None or self.lock.locked() or time.monotonic() < self._not_before:
            return False
        if self._shards[0].core.writer.failure is not None:
            return False
        return (
            self.failure is not None
            or steps >= settings.checkpoint_steps
            or (steps > 0 and (self._age_s() >= settings.checkpoint_seconds or self._has_long_journal()))
        )

    @property
    def overdue_s(self) -> float | None:
        """Seconds by which the newest checkpoint is older than `checkpoint_seconds`, 0 where no step has come since it.

        None where it is not for this process to have one written.
        """
        steps = self._uncovered_steps()
        if steps is None:
            return None
        return max(0.0, self._age_s() - self._context.settings.checkpoint_seconds) if steps else 0.0

    def _uncovered_steps(self) -> int | None:
        """Steps since the newest checkpoint; None where it is not for this process to have one written."""
        shards = self._shards
        if not shards.has_first or not self._context.keeps_checkpoints or not shards[0].core.initialized:
            return None
        return shards[0].core.writer.applied_step - (self._last[0] or 0)

    def _age_s(self) -> float:
        return time.monotonic() - self._last[1]

    def _has_long_journal(self) -> bool:
        journal = self._shards[0].core.journal
        return journal is not None and journal.since_checkpoint >= self._context.settings.journal_max_bytes

    def give_up(self) -> None:
        """Waits for no other shard's part any longer."""
        for waiter in self._durable.values():
            if not waiter.done():
                waiter.set_exception(ShardUnavailable("the process that waited for the checkpoint is being stopped"))

    async def write_now(self) -> Checkpoint:
        """Writes a checkpoint now. Pushes wait for the copy of the state, not for the disk.

        Raises RunNotInitialized, ShardUnavailable and StorageUnavailable.
        """
        lowest = self._shards.lowest
        if lowest is not None and not lowest.core.initialized:
            raise RunNotInitialized
        async with self.lock:
            began = time.monotonic()
            self._not_before = began + _PAUSE_AFTER_FAILURE_S
            try:
                identity = await (self._write_parts() if self._shards.is_sharded else self._write_whole())
            except FreestepError as error:
                self.failure = str(error)
                self._context.telemetry.checkpoint_failed()
                raise
            self._note(identity)
            self._not_before = 0.0
            seconds = time.monotonic() - began
            self._context.telemetry.checkpointed(seconds)
            logger.info(
                "run %s: a checkpoint of step %d was written in %.3g s",
                *(self._context.name, identity.step, seconds),
                extra={"step": identity.step, "epoch": identity.epoch, "seconds": seconds},
            )
            self._context.events.checkpoint(identity)
        return await self._disk.run(self._checkpoints.describe, identity)

    async def write_or_retry(self) -> None:
        """Writes a checkpoint now; where that fails, it is logged and repeated in the background."""
        try:
            await self.write_now()
        except FreestepError as error:
            logger.warning("run %s: a checkpoint was not written, and is tried again: %s", self._context.name, error)

    async def _write_whole(self) -> CheckpointId:
        core = self._shards.require(0).core
        if core.journal is not None:
            core.journal.mark()
        copy = await core.writer.run(core.shard.copy_state)
        identity = CheckpointId(copy.epoch, copy.step, copy.seq)
        size = await self.write(self._shards.require(0), copy)
        await self._disk.run(self._checkpoints.complete, identity)
        self._cut_journals(identity)
        with suppress(CoordinatorUnavailable, Fenced):
            await self._coordinator.log.part_written(core.owner(), identity, size)
        return identity

    async def _write_parts(self) -> CheckpointId:
        """Has every shard write its part of one state; returns when all are on disk."""
        opening, log = self._coordinator.opening, self._coordinator.log
        before = await opening.read()
        identity = await self._recovery.call(lambda: log.mark_checkpoint(self._shards.require_any().core.owner()))
        durable = self._durable.setdefault(identity, asyncio.get_running_loop().create_future())
        self._recovery.catch_up()
        try:
            async with asyncio.timeout(_OTHERS_S + self._context.settings.queue_seconds):
                while not (await asyncio.wait([durable], timeout=_POLL_S))[0]:
                    view = await opening.read()
                    if view is not None and view.run.get("durable") == str(identity):
                        await self.complete(identity)
                    elif view is None or before is None or view.generation != before.generation:
                        raise ShardUnavailable("the run was opened again before all shards had written their parts")
            durable.result()
        except TimeoutError:
            raise ShardUnavailable("a shard has not written its part of the checkpoint in time") from None
        finally:
            self._durable.pop(identity, None)
        return identity

    def on_mark(self, shard: LocalShard, copied: asyncio.Future[StateCopy]) -> None:
        """Writes a shard's part of the checkpoint that the log has marked."""
        self._background.spawn(
            self._write_part(shard, copied), f"shard {shard.index}'s part of a checkpoint was not written"
        )

    async def _write_part(self, shard: LocalShard, copied: asyncio.Future[StateCopy]) -> None:
        async with shard.core.writing:
            # One after the other: Redis keeps the newest that each shard has reported.
            await self._write_and_report(shard, await copied)

    async def _write_and_report(self, shard: LocalShard, copy: StateCopy) -> None:
        identity = CheckpointId(copy.epoch, copy.step, copy.seq)
        try:
            size = await self.write(shard, copy)
        except FreestepError as error:
            self.failure = str(error)
            self._context.telemetry.checkpoint_failed()
            if (waiter := self._durable.get(identity)) is not None and not waiter.done():
                waiter.set_exception(error)
            raise
        try:
            await self._coordinator.log.part_written(shard.core.owner(), identity, size)
        except Fenced:
            self._recovery.fenced()

    async def write(self, shard: LocalShard, copy: StateCopy) -> int:
        """Writes a shard's state with the receipts that are in it; returns the bytes of its tensors."""
        receipts = self._context.receipts.until(copy.seq)
        counted = copy.tally
        copy = replace(
            copy, tally=(await self._tally())._replace(applied=counted.applied, accumulated=counted.accumulated)
        )
        begin, end = shard.core.manifest.begin, shard.core.manifest.end
        numel = self._context.manifest.numel
        size = await self._disk.run(self._checkpoints.write, copy, begin, end, numel, receipts)
        self._written = CheckpointId(copy.epoch, copy.step, copy.seq), copy.control
        return size

    async def _tally(self) -> Tally:
        """What is counted of the run's pushes by now; where Redis is away, by the last heartbeat.

        Of it a checkpoint has the dropped ones, which are in no log, and the averages.
        """
        telemetry = self._context.telemetry
        with suppress(CoordinatorUnavailable):
            view = await self._coordinator.opening.read()
            if view is not None:
                telemetry.note(view)
        if not self._shards.has_first:
            return telemetry.tally
        return telemetry.tally._replace(loss=telemetry.loss, staleness=telemetry.staleness)

    def note_durable(self, view: RunView) -> None:
        """Takes the newest checkpoint for complete, should its message not have come."""
        if (durable := view.run.get("durable")) is None:
            return
        identity = CheckpointId(*map(int, durable.split("-")))
        self._cut_journals(identity)
        is_known = self.step is not None and identity.step <= self.step
        if is_known or self.lock.locked() or identity.epoch != self._shards.epoch:
            return
        if self._written is not None and self._written[0] == identity:
            self._background.spawn(self.complete(identity), "a checkpoint was not completed")
        else:
            # There may be no part of it here.
            self._note(identity)

    def _cut_journals(self, identity: CheckpointId) -> None:
        for shard in self._shards:
            if shard.core.journal is not None:
                shard.core.journal.cut(identity)

    async def complete(self, identity: CheckpointId) -> None:
        """All parts of a checkpoint are on disk."""
        await self._disk.run(self._checkpoints.complete, identity)
        self._cut_journals(identity)
        self._note(identity)
        self._context.events.checkpoint(identity)
        if (waiter := self._durable.get(identity)) is not None and not waiter.done():
            waiter.set_result(None)
