"""One run, as the rest of the service sees it: what is asked of it, and what its parts ask of each other.

Its parts are what does the work: the shards that are owned here (`ownership`, `loading`, `owned`), leases, checkpoints
in the making. What they are told by other processes comes through here too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from freestep.api.models import Checkpoint, RunSpec, RunStatus, Topology
from freestep.errors import (
    CheckpointNotFound,
    CoordinatorUnavailable,
    InvalidSpec,
    RunExists,
    RunNotInitialized,
    ShardUnavailable,
    StepNotReached,
)
from freestep.wire.manifest import Manifest
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.run_scripts import not_open
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.opening import Decision
from freestep_service.domain.records import Claim, LogPosition, LogTruncated, Receipts, Record
from freestep_service.domain.run_view import RunView
from freestep_service.domain.topology import topology
from freestep_service.optimizers import Quantized
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.leases import Leases
from freestep_service.runs.loading import Loading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.ownership import Ownership
from freestep_service.runs.pushes import PushOptions
from freestep_service.runs.reports import MetricReports
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.settings import Settings
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.snapshots import Reading, Snapshot
from freestep_service.state.staging import Body, stage
from freestep_service.state.writer import Writer
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import Storage
from freestep_service.storage.run_files import LastEpochs, RunFile

__all__ = ["Run"]

logger = logging.getLogger("freestep")


class Run:
    """A run, of which this process owns some shards, all or none."""

    def __init__(
        self,
        name: str,
        spec: RunSpec,
        shards: int,
        node: Node,
        settings: Settings,
        store: Store,
        storage: Storage,
        messages: Channels,
        device: torch.device,
        locks: DeviceLocks,
        metrics: RunMetrics,
    ) -> None:
        self.name = name
        self.spec = spec
        self.canonical_spec = spec.model_dump_json()
        self.manifest = Manifest.of(spec)
        self._node = node
        self._settings = settings
        self._storage = storage
        self._device = device
        self._locks = locks
        self._metrics = metrics
        self.coordinator = Coordinator(store, name, self.canonical_spec, Policy.of(spec.aggregation))
        self._checkpoints = Checkpoints(storage, name, settings.checkpoints_kept)
        self._last_epochs = LastEpochs(storage)
        self._receipts = Receipts()
        patience_ms = int(1000 * settings.stall_seconds)
        self.leases = Leases(self.coordinator, self, self._receipts, metrics, spec.lease_ttl_ms, patience_ms)
        self.feedback = MetricReports(self.coordinator, self)
        self._whole = VectorPool(self.manifest.numel, 1)
        self.checkpointing = Checkpointing(self, self._checkpoints, self._receipts, settings, metrics)
        self._loading = Loading(self, self._checkpoints, storage, self._receipts, self.checkpointing, metrics)
        self._ownership = Ownership(self, shards, node, store, messages, self._last_epochs, self._loading)
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def count(self) -> int:
        """How many shards there are."""
        return self._ownership.count

    @property
    def owned(self) -> Mapping[int, LocalShard]:
        """The shards that this process owns."""
        return self._ownership.owned

    @property
    def is_gone(self) -> bool:
        """Whether another process has deleted it."""
        return self._ownership.is_gone

    # What its parts ask of it

    @property
    def many(self) -> bool:
        """Whether there are several shards."""
        return self.count > 1

    @property
    def listens(self) -> bool:
        """Whether what other processes do for the run concerns its pushes here."""
        return self.many or self.spec.aggregation.slack is not None

    @property
    def is_looked_after_elsewhere(self) -> bool:
        """Whether its one shard is another process's, which would not hear of leases that are granted or end here."""
        return not (self.many or self.owned)

    @property
    def writer(self) -> Writer | None:
        """That of the first shard owned here, which knows the log as well as any other."""
        return self.owned[min(self.owned)].writer if self.owned else None

    @property
    def leads(self) -> bool:
        """Whether it is for this process to do what is done once for a run."""
        return 0 in self.owned

    def fenced(self) -> None:
        """Somebody else owns a shard that this process took for its own."""
        self._spawn(self.keep())

    async def reopen(self) -> None:
        """Has the run's part of Redis written anew, because Redis has lost what the shards have seen.

        Raises RunNotFound, ShardUnavailable while other processes have to say what they have.
        """
        await self._ownership.reopen()

    async def catch_up(self) -> None:
        """Reads what of the log was not heard."""
        if self.owned:
            after = min(owned.writer.taken_seq for owned in self.owned.values())
            try:
                entries = await self.coordinator.log.entries(LogPosition(self.epoch, after))
            except LogTruncated as error:
                logger.error("run %s cannot go on: %s", self.name, error)
                self._ownership.is_troubled = True
                return
            for entry in entries:
                self.on_entry(entry)

    def catch_up_soon(self) -> None:
        """As `catch_up`, in the background."""
        self._spawn(self._catch_up_quietly())

    async def _catch_up_quietly(self) -> None:
        with suppress(CoordinatorUnavailable):
            await self.catch_up()

    def make_owned(self, index: int, token: str) -> LocalShard:
        """Makes a shard that is owned from now on, and has no state yet."""
        device = self._device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", index % torch.cuda.device_count())
        return LocalShard(
            self.name, self.spec, self.manifest, index, self.count, token, device, self.coordinator,
            self._receipts, self._settings, self._locks, self, self.checkpointing.keep_cut,
        )  # fmt: skip

    def says(self) -> dict[str, str]:
        """What a heartbeat tells of the owned shards: fields of the shards' hash."""
        says = {f"{index}:applied": str(owned.writer.applied_step) for index, owned in self.owned.items()}
        if self.leads and self._metrics.loss is not None:
            says["0:loss"] = repr(self._metrics.loss)
        if self.leads and self._metrics.staleness is not None:
            says["0:staleness"] = repr(self._metrics.staleness)
        return says

    # Its beginning, and its heartbeat

    async def create(self) -> None:
        """Starts as a new run, which waits for its initial weights. Raises RunExists."""
        epoch = await asyncio.to_thread(self._last_epochs.read, self.name) + 1
        if await self.coordinator.opening.create(epoch, self.count) == "different":
            raise RunExists(f"the run {self.name!r} exists with another spec", run=self.name)
        await asyncio.to_thread(RunFile(self.canonical_spec, epoch, self.count).write, self._storage, self.name)

    async def keep(self) -> None:
        """A heartbeat: keeps what is owned, takes what nobody owns, and helps the run to open."""
        await self._ownership.keep()

    async def prolong(self) -> None:
        """As `keep`, or if that takes its time already, no more than to say that this process lives."""
        await self._ownership.prolong()

    # Channels

    def hear(self, message: dict[str, Any] | None) -> None:
        """Takes a message from the run's channel; None: some may have been missed."""
        if message is None:
            self.catch_up_soon()
            self._spawn(self.keep())
            return
        match message["kind"]:
            case "entry":
                self.on_entry(message)
            case "decided":
                record = Record.from_json(message["record"])
                self._receipts.remember(message["key"], record, message["evicted"] or ())
                for owned in self.owned.values():
                    owned.pushes.decided(message["key"], record, {})
            case "refused":
                for owned in self.owned.values():
                    owned.pushes.refused(message["key"], message["slug"], message["detail"])
            case "granted":
                for owned in self.owned.values():
                    owned.pushes.granted(message["key"])
            case "moved":
                for owned in self.owned.values():
                    owned.pushes.moved()
            case "initialized":
                for owned in self.owned.values():
                    owned.uploaded(message["upload"])
            case "evicted":
                self._receipts.forget(message["keys"])
            case "durable":
                self._spawn(self.checkpointing.note_durable(message["cut"]))
            case "phase" | "deleted":
                self._spawn(self.keep())

    def on_entry(self, entry: dict[str, Any]) -> None:
        """Takes an entry of the log, as Redis tells it."""
        if (measured := entry.get("measured")) and self.leads:
            self._metrics.measured(measured["name"], float(measured["value"]))
        if "key" in entry and self.writer is not None and entry["epoch"] == self.writer.epoch:
            evicted = entry.get("evicted") or ()
            self._receipts.remember(entry["key"], Record.from_json(entry["record"]), evicted)
        for owned in self.owned.values():
            if not owned.hear(entry) and self.many and owned.initialized:
                # A push was committed of which this shard has no part: it cannot go on from here.
                logger.error("run %s: shard %d lacks entry %d of the log", self.name, owned.index, entry["seq"])
                self._ownership.is_troubled = True

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Pushes and pulls

    def owns(self, index: int) -> bool:
        """Whether a shard is this process's."""
        return index in self.owned

    def require_initialized(self, owned: LocalShard) -> None:
        """Raises RunNotInitialized."""
        if not owned.initialized:
            raise RunNotInitialized

    @asynccontextmanager
    async def staged(self, body: Body, encodings: Collection[str] = ("dense",)) -> AsyncIterator[Tensor]:
        """A body of the whole model, flat [numel], fp32, or BF16 or F16 as it came; one at a time.

        Raises MalformedTensors.
        """
        vector = await self._whole.acquire()
        try:
            whole, _, _ = await stage(body, self.manifest, vector, self._locks, encodings)
            if isinstance(whole, Quantized):
                whole = await asyncio.to_thread(whole.decoded, 0, whole.numel(), vector.tensor())
            yield whole
        finally:
            self._whole.release(vector)

    def shard(self, index: int) -> LocalShard:
        """A shard that this process owns. Raises ShardUnavailable."""
        owned = self.owned.get(index)
        if owned is None or owned.loaded is None:
            self._ownership.require_open()
            raise not_open(self.name, self._ownership.missing)
        return owned

    async def initialize(self, owned: LocalShard, body: Body, upload: str | None) -> None:
        """Takes a shard's part of the initial weights. Raises AlreadyInitialized for all but the first upload."""
        await owned.initialize(body, upload or secrets.token_hex(16))
        if self.leads and owned.index == 0 and self.spec.durability == "checkpoint":
            await self.checkpoint()

    def require_loss(self, claim: Claim) -> None:
        """Raises InvalidSpec where the run's algorithm needs the loss of each push, and this one says none."""
        if self.spec.optimizer.needs_loss and claim.loss is None:
            algorithm = self.spec.optimizer.algorithm
            raise InvalidSpec(f"{algorithm} needs the header Freestep-Loss on each push", field="Freestep-Loss")

    async def push(self, owned: LocalShard, claim: Claim, body: Body, wish: PushOptions) -> tuple[Record, bool]:
        """Carries a push to its decision: its record, and whether that was known before. Raises what pushes.py says."""
        self.require_initialized(owned)
        began = time.monotonic()
        try:
            record, replayed = await owned.pushes.push(claim, body, wish)
        except ShardUnavailable:
            self._ownership.require_open()
            raise
        if replayed:
            self._metrics.replayed()
        else:
            self._metrics.received(body.length)
            if owned.index == 0:
                self._metrics.pushed(record, claim.loss, time.monotonic() - began)
            self._metrics.at(self.epoch, self.step)
        return record, replayed

    @asynccontextmanager
    async def read(self, owned: LocalShard, reading: Reading) -> AsyncIterator[Snapshot]:
        """A shard's part of a point as a body, immutable until the block ends. Raises RunNotInitialized."""
        self.require_initialized(owned)
        try:
            async with owned.read(reading) as snapshot:
                yield snapshot
                self._metrics.sent(snapshot.size)
        except ShardUnavailable:
            self._ownership.require_open()
            raise

    async def wait_for(self, owned: LocalShard, step: int, wait: float) -> None:
        """Returns when a shard has reached a step. Raises StepNotReached after `wait` seconds."""
        if not await owned.writer.reach(step, wait):
            self._ownership.require_open()
            raise StepNotReached(f"the run is at step {owned.writer.applied_step}", step=owned.writer.applied_step)

    @property
    def _standing(self) -> RunView | None:
        return self._ownership.standing

    @property
    def epoch(self) -> int:
        if self.writer is not None:
            return self.writer.epoch
        return self._standing.number("epoch") if self._standing else 0

    @property
    def step(self) -> int:
        """The newest step that is applied here, or what was last heard of it."""
        if self.writer is not None:
            return self.writer.applied_step
        return self._standing.number("step") if self._standing else 0

    async def status(self) -> RunStatus:
        standing = await self.coordinator.opening.read()
        workers, metrics = await self.leases.workers(), await self.feedback.newest()
        fields = standing.run if standing else {}
        loss, staleness = self._metrics.loss, self._metrics.staleness
        if standing and not self.leads:
            loss, staleness = (_number(standing.field(0, name)) for name in ("loss", "staleness"))
        checkpoint_step = self.checkpointing.step
        if checkpoint_step is None and "durable_step" in fields:
            checkpoint_step = int(fields["durable_step"])
        initialized = fields.get("initialized") == "1"
        if self.owned:
            initialized = all(owned.initialized for owned in self.owned.values())
        return RunStatus(
            run=self.name,
            epoch=self.epoch,
            step=self.step if self.owned or not standing else standing.number("step"),
            initialized=initialized,
            spec=self.spec,
            workers=workers,
            pushes={name: int(fields.get(name, 0)) for name in ("applied", "accumulated", "dropped")},
            loss=loss,
            staleness=staleness,
            metrics=metrics,
            checkpoint_step=checkpoint_step,
            parameter_count=self.manifest.numel,
            shards=self.count,
        )

    async def topology(self) -> Topology:
        """Where the shards are."""
        standing = await self.coordinator.opening.read()
        if standing is None:
            self._ownership.require_open()
            raise not_open(self.name, list(range(self.count)))
        applied = {index: owned.writer.applied_step for index, owned in self.owned.items() if owned.loaded is not None}
        # Redis's clock: what has run out is said by whoever keeps the run.
        return topology(self.name, self.manifest, standing, self._standing.now_ms if self._standing else 0, applied)

    def owner_url(self, index: int) -> str | None:
        """Where a shard's owner was last known to be, if that is another process."""
        if self._standing is None or self._standing.field(index, "node") == self._node.id:
            return None
        return self._standing.field(index, "url")

    # Checkpoints

    async def checkpoint(self) -> Checkpoint:
        """Writes a checkpoint now. Pushes wait for the copy of the state, not for the disk."""
        if self.owned and not self.owned[min(self.owned)].initialized:
            raise RunNotInitialized
        return await self.checkpointing.write_now()

    async def list_checkpoints(self) -> list[Checkpoint]:
        return await asyncio.to_thread(self._checkpoints.all)

    def is_checkpoint_due(self) -> bool:
        """Whether it is for this process to have a checkpoint written, and time."""
        if not self.leads or self.spec.durability != "checkpoint" or not self.owned[0].initialized:
            return False
        return self._standing is not None and self._standing.phase == "open" and self.checkpointing.is_due(self.step)

    async def restore(self, step: int) -> None:
        """Goes back to the checkpoint of a step, in a new epoch. Raises CheckpointNotFound."""
        cut = await asyncio.to_thread(self._checkpoints.at, step)
        for owned in list(self.owned.values()):
            # Before anything is changed. What other processes have to load they look at when they do.
            try:
                await asyncio.to_thread(self._checkpoints.load, cut, owned.manifest.begin, owned.manifest.end)
            except Damaged as error:
                raise CheckpointNotFound(f"the checkpoint of step {step} is damaged: {error}", step=step) from None
        async with self._ownership.opening():
            generation = await self.coordinator.opening.gather(self.count)
            standing = await self.coordinator.opening.read()
            # Beyond a restore that failed halfway too: Redis may have granted leases in its epoch.
            last = max(await self._loading.last_epoch(), standing.number("epoch") if standing else 0)
            decision = Decision(last + 1, cut, initialized=True)
            if standing is None or not await self._loading.open(_of(standing, generation), decision):
                raise ShardUnavailable("the run was opened otherwise in the meantime")
        if self.epoch < decision.epoch:
            raise CheckpointNotFound(f"the checkpoint of step {step} is damaged", step=step)
        # So that a crash from here on returns to this state and not to one that was given up.
        if self.spec.durability == "checkpoint":
            await self.checkpoint()

    async def reshard(self, shards: int) -> None:
        """ConsistentReads the run into another number of shards, in a new epoch; nothing that was applied is lost."""
        if self.spec.durability != "checkpoint":
            raise InvalidSpec("a run without checkpoints cannot be cut anew", field="durability")
        if shards == self.count:
            return
        if self.spec.optimizer.needs_loss:
            raise InvalidSpec(
                "the algorithm's step size needs sums over all parameters, and has them in one shard", field="shards"
            )
        async with self._ownership.opening():
            await self.coordinator.opening.gather(self.count, resharding=shards)
        if self.count != shards:
            raise ShardUnavailable("a shard was lost while the run was being cut anew")

    # The end

    async def close(self) -> None:
        """Writes the last checkpoint and gives up what is owned; nothing may be asked of the run any more."""
        async with self._ownership.lock:
            self._ownership.is_closed = True
            await self.checkpointing.settle()
            await self._ownership.give_up_all()

    async def delete(self) -> None:
        """Forgets the run: in Redis first, then on disk."""
        # Before Redis forgets the run: who finds it gone there must not write it anew.
        async with self._ownership.lock:
            self._ownership.is_closed = True
            try:
                last = await self._loading.last_epoch()
                await asyncio.to_thread(self._last_epochs.write, self.name, last)
                await self.coordinator.opening.delete()
            except (CoordinatorUnavailable, OSError):
                self._ownership.is_closed = False
                raise
            for owned in self.owned.values():
                await owned.pushes.close()
            self.checkpointing.give_up()
            async with self.checkpointing.lock:
                await self.checkpointing.settle()
                await asyncio.to_thread(self._checkpoints.remove)
            await self.forget()

    async def forget(self) -> None:
        """Lets go of a run that is no more."""
        await self._ownership.drop_all()
        self._metrics.forget()


def _of(standing: RunView, generation: int) -> RunView:
    return RunView({**standing.run, "generation": str(generation)}, standing.shards, standing.now_ms)


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
