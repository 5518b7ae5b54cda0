"""One run: its shard, its part of Redis and its checkpoints, kept in step with each other."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import torch

from freestep.errors import (
    AlreadyInitialized,
    CoordinatorUnavailable,
    MalformedTensors,
    RunExists,
    RunNotFound,
    RunNotInitialized,
    StepNotReached,
)
from freestep.models import Checkpoint, Point, Receipt, RunSpec, RunStatus
from freestep.wire import Manifest
from freestep_service.aggregation import Policy
from freestep_service.checkpoints import Checkpoints, LastEpochs, RunFile
from freestep_service.coordinator import Coordinator
from freestep_service.ingest import Body
from freestep_service.leases import Leases
from freestep_service.metrics import RunMetrics
from freestep_service.pushes import Pushes, Receipts, stage, staging_vectors
from freestep_service.records import Behind, Claim, Record, RunState
from freestep_service.settings import Settings
from freestep_service.shard import Cut, Shard
from freestep_service.snapshots import Snapshot, Snapshots
from freestep_service.store import Store
from freestep_service.vectors import VectorPool
from freestep_service.writer import Writer

__all__ = ["Run"]

_PAUSE_AFTER_FAILURE_S = 10.0
"""Before a checkpoint that could not be written, on a full disk say, is tried again in the background."""


class Run:
    """A run that this process owns, with its one shard."""

    def __init__(
        self,
        name: str,
        spec: RunSpec,
        settings: Settings,
        store: Store,
        device: torch.device,
        metrics: RunMetrics,
    ) -> None:
        self.name = name
        self.spec = spec
        self.canonical_spec = spec.model_dump_json()
        self.manifest = Manifest(spec.parameters)
        self.initialized = False
        self._settings = settings
        self._metrics = metrics
        policy = Policy.of(spec.aggregation)
        self.coordinator = Coordinator(store, name, self.canonical_spec, policy)
        self.directory = settings.data_dir / "runs" / name
        self._checkpoints = Checkpoints(self.directory / "checkpoints", settings.checkpoints_kept)
        self._last_epochs = LastEpochs(settings.data_dir)
        self._checkpointing = asyncio.Lock()
        self._checkpointed: tuple[int | None, float] = (None, time.monotonic())
        self._checkpoint_not_before = 0.0
        self._shard = Shard(spec, device)
        self._writer = Writer(self._shard, name)
        self._snapshots = Snapshots(name, self._writer)
        self._staging = VectorPool(self.manifest.numel, staging_vectors(policy))
        self._receipts = Receipts()
        self._pushes = Pushes(
            spec,
            self.manifest,
            self.coordinator,
            self._writer,
            self._staging,
            self._receipts,
            settings,
            self._reopen,
        )
        self.leases = Leases(self.coordinator, self._writer, self._receipts, metrics, spec.lease_ttl_ms, self._reopen)
        self._opening = asyncio.Lock()
        self._openings = 0
        self._newest_epoch = 0
        self._closed = False

    # Opening

    async def create(self) -> None:
        """Starts as a new run, which waits for its initial weights. Raises RunExists."""
        epoch = await asyncio.to_thread(self._last_epochs.read, self.name) + 1
        if await self.coordinator.create(epoch) == "different":
            raise RunExists(f"the run {self.name!r} exists with another spec", run=self.name)
        await asyncio.to_thread(RunFile(self.canonical_spec, epoch).write, self.directory)
        self._writer.resume(epoch, 0, 0)

    async def open(self, file: RunFile | None, fields: Mapping[str, str]) -> None:
        """Starts from the newest checkpoint, if there is one; else the run waits for its initial weights.

        `file` and `fields` are what the data directory and Redis know of the run. The epoch changes unless
        nothing can have been lost: the run was closed in order, at this very entry of the log.
        """
        newest = None
        if self.spec.durability == "checkpoint":
            newest = await asyncio.to_thread(self._checkpoints.newest)
        epochs = [int(fields.get("epoch", 0)), file.epoch if file else 0]
        is_complete = False
        if newest:
            cut = newest[0]
            epochs.append(cut.epoch)
            is_complete = file is not None and file.closed_seq == cut.seq == int(fields.get("seq", cut.seq))
            self._checkpointed = (cut.step, time.monotonic())
        epoch = max(epochs) + (0 if is_complete else 1)
        await asyncio.to_thread(RunFile(self.canonical_spec, epoch).write, self.directory)
        await self._take(epoch, newest)

    async def _take(self, epoch: int, newest: tuple[Cut, dict[str, Record]] | None) -> None:
        cut, receipts = newest or (None, {})
        state = RunState(epoch)
        if cut is not None:
            state = RunState(epoch, cut.step, cut.seq, True, cut.group, receipts)
        await self.coordinator.open(state)
        if cut is not None:
            await self._writer.run(self._shard.load, cut, epoch)
        self._receipts.clear()
        self._receipts.update(receipts)
        self.initialized = state.initialized
        self._openings += 1
        self._writer.resume(epoch, state.seq, state.step)
        self._metrics.at(epoch, state.step)

    async def _reopen(self) -> None:
        """Writes the run's part of Redis anew, because Redis has lost what the shard has seen."""
        opening = self._openings
        async with self._opening:
            self._require_open()
            if self._openings != opening:
                return
            self._writer.pause(forget=True)
            seq, step, group = await self._writer.run(self._shard.position)
            receipts = self._receipts.until(seq)
            try:
                await self.coordinator.open(RunState(self.epoch, step, seq, self.initialized, group, receipts))
            finally:
                self._writer.resume(self.epoch, seq, step)
            self._receipts.clear()
            self._receipts.update(receipts)
            self._openings += 1

    async def initialize(self, body: Body) -> None:
        """Takes the initial weights. Raises AlreadyInitialized for all but the first who brings them."""
        async with self._opening:
            if self.initialized:
                raise AlreadyInitialized
            vector = await self._staging.acquire()
            try:
                norm, _ = await stage(body, self.manifest, vector)
                if norm is None:
                    raise MalformedTensors("the parameters hold NaN or infinity")
                try:
                    await self.coordinator.initialize()
                except Behind:
                    self._require_open()
                    await self.coordinator.open(RunState(self.epoch, initialized=True))
                await self._writer.run(self._shard.initialize, vector.tensor(), self.epoch)
            finally:
                self._staging.release(vector)
            self.initialized = True
            self._writer.resume(self.epoch, 0, 0)
        if self.spec.durability == "checkpoint":
            await self.checkpoint()

    async def restore(self, step: int) -> None:
        """Goes back to the checkpoint of a step, in a new epoch. Raises CheckpointNotFound."""
        async with self._opening:
            newest = await asyncio.to_thread(self._checkpoints.at, step)
            # Beyond a restore that failed halfway too: Redis may have granted leases in its epoch.
            epoch = self._newest_epoch = max(self.epoch, self._newest_epoch) + 1
            await asyncio.to_thread(RunFile(self.canonical_spec, epoch).write, self.directory)
            self._require_open()
            self._writer.pause()
            try:
                await self._take(epoch, newest)
            except CoordinatorUnavailable:
                self._writer.doubt()
                raise
        # So that a crash from here on returns to this state and not to one that was given up.
        await self.checkpoint()

    async def close(self) -> None:
        """Writes the last checkpoint and stops the writer; nothing may be asked of the run any more."""
        self._closed = True
        settled = await self._pushes.close()
        try:
            if self.initialized and self.spec.durability == "checkpoint":
                seq = (await self._cut_and_write())[0].seq
                if settled and seq == self._writer.known_seq:
                    await asyncio.to_thread(RunFile(self.canonical_spec, self.epoch, seq).write, self.directory)
        finally:
            self._writer.close()

    async def delete(self) -> None:
        """Forgets the run: in Redis first, then on disk."""
        # Before Redis forgets the run: who finds it gone there must not write it anew.
        self._closed = True
        try:
            last = max(self.epoch, self._newest_epoch)
            await asyncio.to_thread(self._last_epochs.write, self.name, last)
            await self.coordinator.delete()
        except (CoordinatorUnavailable, OSError):
            self._closed = False
            raise
        await self._pushes.close()
        async with self._checkpointing:
            await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        self._writer.close()
        self._metrics.forget()

    def _require_open(self) -> None:
        if self._closed:
            raise RunNotFound(f"there is no run {self.name!r}", run=self.name)

    # Pushes and pulls

    async def push(self, claim: Claim, body: Body, loss: float | None, wait: float) -> Receipt:
        """Carries a push to its decision; `wait` seconds at most for an accumulated one's update.

        Raises what pushes.py says.
        """
        self.require_initialized()
        began = time.monotonic()
        record, replayed = await self._pushes.push(claim, body)
        if not replayed:
            self._metrics.pushed(record, body.length, loss, time.monotonic() - began)
            self._metrics.at(self.epoch, self.step)
        else:
            self._metrics.replayed()
        return (await self._pushes.settle(record, wait)).receipt(replayed=replayed)

    @asynccontextmanager
    async def read(self, point: Point, dtype: str) -> AsyncIterator[Snapshot]:
        """A point as a body, immutable until the block ends. Raises RunNotInitialized."""
        self.require_initialized()
        async with self._snapshots.read(point, dtype) as snapshot:
            yield snapshot
            self._metrics.sent(snapshot.size)

    async def wait_for(self, step: int, wait: float) -> None:
        """Returns when the run has reached a step. Raises StepNotReached after `wait` seconds."""
        if not await self._writer.reach(step, wait):
            self._require_open()
            raise StepNotReached(f"the run is at step {self.step}", step=self.step)

    def require_initialized(self) -> None:
        if not self.initialized:
            raise RunNotInitialized

    @property
    def epoch(self) -> int:
        return self._writer.epoch

    @property
    def step(self) -> int:
        """The newest step that is applied."""
        return self._writer.applied_step

    async def status(self) -> RunStatus:
        fields = await self.coordinator.read()
        workers = await self.leases.workers()
        return RunStatus(
            run=self.name,
            epoch=self.epoch,
            step=self.step,
            initialized=self.initialized,
            spec=self.spec,
            workers=workers,
            pushes={name: int(fields.get(name, 0)) for name in ("applied", "accumulated", "dropped")},
            loss=self._metrics.loss,
            staleness=self._metrics.staleness,
            checkpoint_step=self._checkpointed[0],
            parameter_count=self.manifest.numel,
        )

    # Checkpoints

    async def checkpoint(self) -> Checkpoint:
        """Writes a checkpoint now. Pushes wait for the copy of the state, not for the disk."""
        self.require_initialized()
        return (await self._cut_and_write())[1]

    async def list_checkpoints(self) -> list[Checkpoint]:
        return await asyncio.to_thread(self._checkpoints.all)

    def is_checkpoint_due(self) -> bool:
        """Whether enough steps, or enough time with any step in it, have passed since the last checkpoint."""
        if not self.initialized or self.spec.durability != "checkpoint" or self._checkpointing.locked():
            return False
        step, at = self._checkpointed
        steps, now = self.step - (step or 0), time.monotonic()
        if now < self._checkpoint_not_before:
            return False
        elapsed = now - at
        return steps >= self._settings.checkpoint_steps or (steps > 0 and elapsed >= self._settings.checkpoint_seconds)

    async def _cut_and_write(self) -> tuple[Cut, Checkpoint]:
        async with self._checkpointing:
            began = time.monotonic()
            self._checkpoint_not_before = began + _PAUSE_AFTER_FAILURE_S
            cut = await self._writer.run(self._shard.cut)
            written = await asyncio.to_thread(self._checkpoints.write, cut, self._receipts.until(cut.seq))
            self._checkpointed = (cut.step, time.monotonic())
            self._checkpoint_not_before = 0.0
            self._metrics.checkpointed(cut.step, time.monotonic() - began)
            return cut, written
