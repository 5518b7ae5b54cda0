"""A shard that this process owns: its calls, and its entries of the run's log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from freestep.api.data import DataSpec
from freestep.api.models import PointDtype, Receipt, RunSpec
from freestep.errors import FreestepError, InvalidSpec, StepNotReached
from freestep_service.domain.aggregation import Policy, accepted_encodings
from freestep_service.domain.control import ControlChange
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import CheckpointId, Claim, Record
from freestep_service.domain.reports import Measured
from freestep_service.runs.checkpoint_reads import CheckpointReads
from freestep_service.runs.consistent_reads import ConsistentReads, Reading
from freestep_service.runs.context import RunContext
from freestep_service.runs.distance_reports import DistanceReports
from freestep_service.runs.initial_weights import InitialWeights
from freestep_service.runs.phases import Phases
from freestep_service.runs.pushes import Pushes, PushOptions
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.runs.shard_journal import JournaledBody
from freestep_service.runs.state_exports import StateExports
from freestep_service.state.log import Entry
from freestep_service.state.push_entry import committed_push
from freestep_service.state.shard import StateCopy
from freestep_service.state.snapshots import PointBody
from freestep_service.state.staging import Body
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.journal_reader import JournaledPart

__all__ = ["LocalShard", "Outcome"]

logger = logging.getLogger("freestep")


@dataclass(frozen=True)
class Outcome:
    """What became of a push. reading: of the y that its answer is to hold, None where that is a receipt."""

    record: Record
    replayed: bool
    reading: Reading | None = None
    waits: bool = False
    """Whether the y is that of the group's update, which settles an accumulated push."""

    @property
    def is_open(self) -> bool:
        """Whether its update may be waited for: with several shards, the reading of y waits for it."""
        return self.record.decision == "accumulated" and (self.reading is None or not self.reading.ticket)

    def receipt(self, step: int | None = None) -> Receipt:
        """The receipt; beside a y of `step`, that of a push whose update is in it."""
        record = self.record.settled(step) if self.waits and step is not None else self.record
        return record.receipt(replayed=self.replayed)


class LocalShard:
    """Shard `core.index` of a run, with its pushes, reads and initial weights.

    checkpoints: the run's. on_mark: takes a copy of its state, at each place in the log that marks a checkpoint.
    on_change: is told of each change of the run, with the spec that it has in force, and when it is applied.
    """

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        core: ShardCore,
        checkpoints: Checkpoints,
        on_mark: Callable[[LocalShard, asyncio.Future[StateCopy]], None],
        on_change: Callable[[RunSpec, asyncio.Future[None]], None],
    ) -> None:
        self.core = core
        self._context = context
        self._recovery = recovery
        self._telemetry = context.telemetry
        self._weights = InitialWeights(context, recovery, core)
        self._reads = ConsistentReads(context, recovery, core)
        self._exports = StateExports(context, recovery, core)
        self._kept = CheckpointReads(context, core, checkpoints)
        self._pushes = Pushes(context, recovery, core, self._reads.take_sent)
        self._distances = DistanceReports(context, recovery, core)
        self._on_mark = on_mark
        self._on_change = on_change
        self._restoring: set[str] = set()
        """The keys of pushes that are being read from the journal."""
        core.writer.on_taken = self._on_taken
        core.writer.on_failure = lambda: recovery.reopen("an update failed")
        if core.journal is not None:
            # If that is because another process has taken it over, there is nothing to open again.
            core.journal.watch(recovery.look)
            core.journal.time_flushes(context.telemetry.flushed)

    @property
    def index(self) -> int:
        return self.core.index

    @property
    def has_failed(self) -> bool:
        """Whether it takes nothing more until it has another state, or its journal was read anew."""
        journal = self.core.journal
        return self.core.writer.failure is not None or (journal is not None and journal.has_failed)

    # What requests ask of it

    async def initialize(self, body: Body, upload: str) -> None:
        """Takes its part of the initial weights. Raises AlreadyInitialized for all but the first upload."""
        with self._recovery.unless_deleted():
            await self._weights.receive(body, upload)

    async def push(
        self,
        claim: Claim,
        body: Body,
        answer: PointDtype | None = None,
        wait: float = 0.0,
        phases: Phases | None = None,
    ) -> Outcome:
        """Carries a push to its decision, and applies it.

        answer: the dtype of the y to answer with, None for a receipt. wait: seconds for which the update of the push's
        group is to be waited for, by `settle` or by the reading of y. phases: takes when it went from one to the next.
        Raises what pushes.py says, InvalidSpec and RunNotInitialized.
        """
        spec, core = self._context.spec, self.core
        if spec.optimizer.needs_loss and claim.loss is None:
            algorithm = spec.optimizer.algorithm
            raise InvalidSpec(f"{algorithm} needs the header Freestep-Loss on each push", field="Freestep-Loss")
        core.require_initialized()
        began = time.monotonic()
        # With several shards, the commit asks for a place at which all of them read y.
        wanted = f"y {answer}" if answer is not None and core.is_sharded else ""
        with self._recovery.unless_deleted():
            record, replayed = await self._pushes.push(claim, body, PushOptions(wanted, after_update=wait > 0), phases)
        self._observe(record, claim, body, replayed=replayed, seconds=time.monotonic() - began)
        if answer is None:
            return Outcome(record, replayed)
        waits = wait > 0 and (record.decision == "accumulated" or record.reason == "duplicate-worker")
        reading = Reading(
            "y",
            answer,
            ticket=claim.key if core.is_sharded else "",
            readers=core.count,
            answers_push=True,
            is_asked=bool(record.digests) and not replayed,
            patience=wait if waits else 0.0,
        )
        return Outcome(record, replayed, reading, waits)

    async def settle(self, outcome: Outcome, wait: float) -> Outcome:
        """The outcome once the update that an accumulated push is part of is applied, or after `wait` seconds."""
        with self._recovery.unless_deleted():
            return replace(outcome, record=await self._pushes.settle(outcome.record, wait))

    def _observe(self, record: Record, claim: Claim, body: Body, *, replayed: bool, seconds: float) -> None:
        if replayed:
            self._telemetry.replayed()
            return
        self._telemetry.received(body.length)
        if self.core.index == 0:
            self._telemetry.pushed(record, claim.loss, seconds)
            if logger.isEnabledFor(logging.DEBUG):
                self._log_push(record, claim, seconds)

    def _log_push(self, record: Record, claim: Claim, seconds: float) -> None:
        decision = f"{record.decision} ({record.reason})" if record.reason else record.decision
        logger.debug(
            "run %s: push %s of worker %s is %s at step %d, staleness %d, after %.3g s",
            *(self._context.name, claim.key, record.worker, decision, record.step, record.staleness, seconds),
            extra={
                "worker": record.worker,
                "step": record.step,
                "key": claim.key,
                "decision": record.decision,
                "reason": record.reason,
                "staleness": record.staleness,
                "seconds": seconds,
            },
        )

    def answered(self, seconds: float) -> None:
        """The answer to a push was sent, with y."""
        self._telemetry.answered(seconds)

    @asynccontextmanager
    async def read(self, reading: Reading) -> AsyncIterator[PointBody]:
        """Its part of a point as a body, which does not change until the block ends."""
        with self._recovery.unless_deleted():
            async with self._source(reading) as body:
                yield body
        self._telemetry.sent(body.size)

    def _source(self, reading: Reading) -> AbstractAsyncContextManager[PointBody]:
        if reading.checkpoint is not None:
            return self._kept.point(reading.checkpoint, reading.point, reading.dtype)
        self.core.require_initialized()
        return self._reads.read(reading)

    @asynccontextmanager
    async def read_state(self, word: str, readers: int) -> AsyncIterator[StateCopy]:
        """A copy of its state, as `StateExports.read` has it. Raises RunNotInitialized too."""
        self.core.require_initialized()
        with self._recovery.unless_deleted():
            async with self._exports.read(word, readers) as copy:
                yield copy

    async def find_checkpoint(self, step: int) -> CheckpointId:
        """The checkpoint of a step, as `CheckpointReads.find` has it."""
        return await self._kept.find(step)

    @asynccontextmanager
    async def read_checkpoint(self, checkpoint: CheckpointId) -> AsyncIterator[StateCopy]:
        """Its part of the state in a checkpoint, as `CheckpointReads.state` has it."""
        with self._recovery.unless_deleted():
            async with self._kept.state(checkpoint) as copy:
                yield copy

    async def reach(self, step: int, wait: float) -> None:
        """Returns when it has reached a step. Raises StepNotReached after `wait` seconds."""
        self.core.require_initialized()
        with self._recovery.unless_deleted():
            if not await self.core.writer.reach(step, wait):
                epoch, applied = self.core.writer.epoch, self.core.writer.applied_step
                raise StepNotReached(f"the run is at step {applied}", epoch=epoch, step=applied)

    # Entries and messages

    def on_entry(self, entry: dict[str, Any]) -> bool:
        """Takes an entry of the log, as Redis has it; False where it is a push whose gradient is not here."""
        writer = self.core.writer
        epoch, seq, reads = entry["epoch"], entry["seq"], entry.get("cuts") or {}
        if epoch != writer.epoch or writer.has(epoch, seq):
            return True
        writer.note(epoch, seq)
        if "key" in entry:
            record = Record.from_json(entry["record"])
            return self._pushes.committed(entry["key"], record, reads, entry) or self._find(entry)
        measured, data, control = entry.get("measured"), entry.get("data"), entry.get("control")
        change = control and ControlChange.of(control)
        applied = writer.submit(
            Entry(
                seq,
                epoch,
                advance=entry["advance"],
                reads=reads,
                checkpoint=bool(entry.get("checkpoint")),
                members=entry,
                measured=measured and Measured(measured["name"], measured["step"], float(measured["value"])),
                data=data and NewDataSet(data["name"], DataSpec.model_validate_json(data["spec"])),
                control=change,
            )
        )
        if change is not None and change.control is not None:
            self._on_change(change.control.in_force(self._context.spec), applied)
        return True

    def take_entry(self, entry: dict[str, Any]) -> bool:
        """As `on_entry`, with the receipt of its push, where no message of it may have come."""
        if not self.on_entry(entry):
            return False
        if entry["epoch"] == self.core.writer.epoch:
            self._context.receipts.take(entry)
        return True

    def _find(self, entry: dict[str, Any]) -> bool:
        """Whether a push whose request is gone is in the journal; it is taken from there then."""
        journal, key = self.core.journal, entry["key"]
        part = journal.find(key) if journal is not None else None
        if part is not None and key not in self._restoring:
            self._restoring.add(key)
            task = self._context.background.spawn(
                self.restore(entry, part), f"entry {entry['seq']} was not read from the journal"
            )
            task.add_done_callback(lambda _: self._restoring.discard(key))
        return part is not None

    async def restore(self, entry: dict[str, Any], part: JournaledPart | None) -> None:
        """Takes an entry of the log that is in the journal, or whose push is. Raises Damaged, OSError, Overloaded."""
        if "key" not in entry:
            self.on_entry({name: value for name, value in entry.items() if name not in ("checkpoint", "cuts")})
            return
        context, staging, staged = self._context, self.core.staging, None
        record = Record.from_json(entry["record"])
        if part is not None and record.decision != "dropped":
            vector = await staging.pool.acquire(context.settings.queue_seconds)
            body = JournaledBody(part, context.resources.disk)
            try:
                staged = await staging.receive(body, vector, accepted_encodings(context.spec.aggregation))
            except FreestepError:
                # It was accepted once. Of bytes that have changed since, their checksum tells, and where they are.
                await context.resources.disk.run(part.check)
                raise
        claim = Claim("", 0, 0, entry["key"]) if part is None else part.claim
        distances = (
            torch.tensor(entry["distances"], dtype=torch.float64, device="cpu") if "distances" in entry else None
        )
        self.core.writer.submit(committed_push(claim, staged, record, {}, members=entry, distances=distances))

    def _on_taken(self, entry: Entry) -> None:
        """The next work of the writer sees the state that the entry leaves."""
        if self.core.index == 0:
            self._context.events.took(entry)
        if entry.control is not None and entry.control.control is not None:
            spec = entry.control.control.in_force(self._context.spec)
            self.core.follow(Policy.of(spec.aggregation))
        if entry.reads:
            self._reads.take(entry)
            self._exports.take(entry)
        if entry.checkpoint:
            if self.core.journal is not None:
                self.core.journal.mark()
            self._on_mark(self, self.core.writer.call(self.core.shard.copy_state))

    def on_dropped(self, key: str, attempt: str | None, record: Record) -> None:
        """A push was decided without a place in the log."""
        self._pushes.dropped(key, attempt, record)

    def on_refused(self, key: str, attempt: str | None, slug: str, detail: str) -> None:
        """A push was refused by another shard, or its lease has ended."""
        self._pushes.refused(key, attempt, slug, detail)

    def on_granted(self, key: str, attempt: str | None) -> None:
        """A push's turn to send its body has come."""
        self._pushes.granted(key, attempt)

    def on_asked(self, key: str, attempt: str, claim: str) -> None:
        """A push's part has been arriving for long, as far as Redis knows."""
        self._pushes.asked(key, attempt, claim)

    def on_moved(self) -> None:
        """The slowest worker has moved on."""
        self._pushes.moved()

    def on_initialized(self, upload: str) -> None:
        """An upload of initial weights has won."""
        self._weights.won(upload)

    def on_distances_lost(self, epoch: int, seq: int) -> None:
        """Redis has lost the distances of an update that another shard has yet to make."""
        self._distances.repeat(epoch, seq)

    # The end

    async def close_pushes(self) -> bool:
        """Takes no pushes any more; whether none was undecided."""
        return await self._pushes.close()

    async def close(self) -> None:
        """Stops, once what has a place in the log is applied or lost."""
        if self.core.index == 0:
            self._context.events.end()
            self._context.history.end()
        await self._pushes.close()
        self._reads.close()
        self._exports.close()
        self._weights.close()
        await self.core.writer.close()
        await self._distances.close()
        if self.core.journal is not None:
            await self.core.journal.close()
