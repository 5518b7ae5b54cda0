"""One run, as the web sees it: its shards that are here, its leases, reports and checkpoints, and how it begins."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress

from freestep.api.models import Checkpoint, RunSpec, RunStatus, Topology
from freestep.errors import (
    CheckpointNotFound,
    CoordinatorUnavailable,
    InvalidSpec,
    RunNotFound,
    ShardUnavailable,
    StorageUnavailable,
)
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.run_scripts import not_open
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control
from freestep_service.domain.data_progress import progress_of
from freestep_service.domain.history import HistoryCurves
from freestep_service.domain.opening import Decision
from freestep_service.domain.records import UNKNOWN_ORIGIN, CheckpointId, Origin, Receipts
from freestep_service.domain.specs import require_same_spec
from freestep_service.domain.tally import Tally
from freestep_service.domain.topology import Layout, topology
from freestep_service.runs.background import Background
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.controls import Controls
from freestep_service.runs.data_units import DataUnits
from freestep_service.runs.deletions import Deletions
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.ending import Ending
from freestep_service.runs.events import RunEvents
from freestep_service.runs.held_states import HeldStates
from freestep_service.runs.history import RunHistory
from freestep_service.runs.keeper import Keeper
from freestep_service.runs.known_leases import KnownLeases
from freestep_service.runs.leases import Leases
from freestep_service.runs.loading import Loading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.log_appends import LogAppends
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.ownership import Ownership
from freestep_service.runs.placement import Placement
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.reports import MetricReports
from freestep_service.runs.resources import Resources
from freestep_service.runs.run_gauges import RunHere
from freestep_service.runs.run_memory import RunMemory
from freestep_service.runs.shard_core import ShardCore
from freestep_service.runs.standing import Standing
from freestep_service.runs.state_imports import StateImports
from freestep_service.runs.stored_states import StoredStates
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.runs.whole_bodies import WholeBodies
from freestep_service.state.staging import Body
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.run_files import RunFile

__all__ = ["Run"]

logger = logging.getLogger("freestep")


class Run:
    """A run, of which this process owns some shards, all or none.

    manifest: the spec's. origin: where it began, as far as that is known.
    """

    def __init__(
        self,
        name: str,
        spec: RunSpec,
        manifest: Manifest,
        shards: int,
        resources: Resources,
        origin: Origin = UNKNOWN_ORIGIN,
    ) -> None:
        settings, storage = resources.settings, resources.storage
        canonical = spec.model_dump_json()
        history = RunHistory(storage, resources.disk, name, origin)
        self.name = name
        self.spec = spec
        self.manifest = manifest
        self._context = context = RunContext(
            name,
            spec,
            canonical,
            origin,
            self.manifest,
            Coordinator(resources.store, name, canonical, Policy.of(spec.aggregation), origin),
            Receipts(),
            KnownLeases(),
            RunMetrics(resources.metrics, name),
            RunEvents(hears=history.take, first_epoch=origin.first_epoch),
            history,
            Background(f"run {name}"),
            resources,
        )
        self.coordinator = context.coordinator
        self._checkpoints = Checkpoints(storage, name, settings.checkpoints_kept, origin.first_epoch)
        self._deletions = Deletions(resources, name)
        self._recovery = recovery = Recovery(name, settings.queue_seconds)
        self._shards = owned = OwnedShards(shards)
        self._memory = memory = RunMemory(context, owned)
        self._checkpointing = Checkpointing(context, recovery, owned, self._checkpoints)
        held = HeldStates()
        dispatch = Dispatch(context, recovery, owned, self._checkpointing, held)
        self._stored = stored = StoredStates(context, owned, self._checkpoints)
        self._loading = loading = Loading(
            context, recovery, owned, memory, stored, self._checkpoints, self._checkpointing, held
        )
        self._standing = standing = Standing(context, owned, stored, loading, self._checkpoints, self._checkpointing)
        self._placement = placement = Placement(context, owned, stored)
        self._ownership = Ownership(
            context, recovery, owned, memory, dispatch, stored, placement, standing, loading, self._make_shard
        )
        self.leases = Leases(context, recovery, owned)
        appends = LogAppends(recovery, owned, dispatch)
        self.reports = MetricReports(context, appends)
        self.controls = Controls(context, recovery, owned, memory, appends, self._checkpointing)
        self.data = DataUnits(context, recovery, owned, dispatch, appends)
        self.imports = StateImports(context, owned, memory, self._ownership, stored, loading, self._checkpointing, held)
        self._keeper = Keeper(context, recovery, self._ownership, dispatch, self.leases, self._checkpointing, self.data)
        self.ending = Ending(
            context,
            recovery,
            owned,
            memory,
            stored,
            self._checkpoints,
            self._checkpointing,
            self._ownership,
            self._keeper,
        )
        self.whole_bodies = WholeBodies(context)
        self._layout: Layout | None = None

    def _make_shard(self, index: int, token: str) -> LocalShard:
        core = ShardCore(self._context, index, self._shards.count, token)
        core.staging.pool.on_shrunk = self._memory.recount
        return LocalShard(
            self._context, self._recovery, core, self._checkpoints, self._checkpointing.on_mark, self._memory.expect
        )

    @property
    def canonical_spec(self) -> str:
        """The spec as JSON."""
        return self._context.canonical_spec

    @property
    def origin(self) -> Origin:
        """Where it began, as far as that is known."""
        return self._context.origin

    # What is here

    @property
    def count(self) -> int:
        """How many shards there are."""
        return self._shards.count

    @property
    def is_sharded(self) -> bool:
        """Whether there are several."""
        return self._shards.is_sharded

    @property
    def owns_any(self) -> bool:
        """Whether a shard is this process's."""
        return len(self._shards) > 0

    def here(self) -> RunHere:
        """How it stands in this process, for /metrics."""
        journals = [shard.core.journal for shard in self._shards if shard.core.journal is not None]
        writers = [shard.core.writer for shard in self._shards if shard.core.loaded is not None]
        has_first = self._shards.has_first
        reported = self._shards[0].core.shard.reported() if has_first else {}
        return RunHere(
            self.name,
            has_problem=self.problem is not None,
            shards=len(self._shards),
            step=max((writer.applied_step for writer in writers), default=None),
            epoch=max((writer.epoch for writer in writers), default=None),
            is_paused=self._shards[0].core.shard.control().orders.paused if has_first else None,
            loss=self._context.telemetry.loss if has_first else None,
            metrics={name: steps[max(steps)] for name, steps in reported.items()},
            checkpoint_step=self._checkpointing.step if has_first else None,
            checkpoint_overdue_s=self._checkpointing.overdue_s,
            event_readers=self._context.events.readers,
            journal_bytes=sum(each.size for each in journals) if journals else None,
            journal_lag_bytes=sum(each.lag for each in journals) if journals else None,
        )

    def owns(self, index: int) -> bool:
        """Whether a shard is this process's."""
        return index in self._shards

    @property
    def leases_are_elsewhere(self) -> bool:
        """Whether its one shard is another process's, which would not hear of leases that are granted or end here."""
        return not (self.is_sharded or self.owns_any)

    @property
    def is_gone(self) -> bool:
        """Whether it is deleted."""
        return self._ownership.is_gone

    def shard(self, index: int) -> LocalShard:
        """A shard that this process owns. Raises ShardUnavailable, and RunNotFound where the run is being deleted."""
        try:
            return self._shards.require(index)
        except ShardUnavailable:
            self._ownership.require_open()
            raise not_open(self.name, self._ownership.missing, self._placement.problem) from None

    @property
    def events(self) -> RunEvents:
        """What happens to it, for the owner of its first shard to tell. Raises what `shard` raises."""
        self.shard(0)
        return self._context.events

    @property
    def history(self) -> HistoryCurves:
        """Its curves, likewise. Raises StorageUnavailable too."""
        self.shard(0)
        return self._context.history.curves

    def owner_url(self, index: int) -> str | None:
        """Where a shard's owner was last known to be, if that is another process."""
        view, node = self._ownership.view, self._context.resources.node
        url = view.field(index, "url") if view else None
        # At this process's own URL there can only be a predecessor, which is no more.
        return None if url == node.url else url

    @property
    def epoch(self) -> int:
        """The newest that is known here."""
        return self._ownership.epoch

    @property
    def problem(self) -> str | None:
        """What is wrong with it here: its shards cannot be taken, its checkpoints not be written, or any other."""
        return (
            self.ending.problem
            or self._placement.problem
            or self._ownership.wrong
            or self._checkpointing.failure
            or self._keeper.problem
        )

    @property
    def has_lost_state(self) -> bool:
        """Whether the state of shards that were this process's, or its predecessor's, is in its storage no more."""
        return self._placement.has_lost_state

    # Its beginning

    async def create(self) -> bool:
        """Starts as a new run, which waits for its initial weights.

        False where another process has just created it; it then has another origin. Raises RunExists and
        StorageUnavailable.
        """
        disk, storage, opening = self._context.resources.disk, self._context.resources.storage, self.coordinator.opening
        origin = self._context.origin
        status = await opening.create(origin.first_epoch, self.count)
        if status == "different":
            view = await opening.read()
            if view is None:
                raise ShardUnavailable("the run was deleted in the meantime")
            # Redis compares texts, in which groups may come in another order.
            require_same_spec(self.name, self.spec, RunSpec.model_validate_json(view.run["spec"]))
        if status != "created":
            return False
        file = RunFile(self._context.canonical_spec, origin.first_epoch, self.count, *origin)
        try:
            await disk.run(file.write, storage, self.name)
        except BaseException:
            with suppress(CoordinatorUnavailable, RunNotFound):
                await self._deletions.note_in_redis(await opening.delete(origin.first_epoch, origin.id))
            raise
        return True

    async def start(self) -> None:
        """Begins to be looked after; returns after a first heartbeat, which opens the run if it can."""
        await self._keeper.look()
        self._keeper.start()

    async def refresh(self) -> None:
        """Reads from Redis who owns what, without waiting for the next heartbeat."""
        await self._keeper.look()

    # Weights

    async def initialize(self, shard: LocalShard, body: Body, upload: str) -> None:
        """Takes a shard's part of the initial weights. Raises AlreadyInitialized for all but the first upload."""
        await shard.initialize(body, upload)
        if shard.index == 0 and self._context.keeps_journal:
            # Acknowledged weights are on disk, too.
            await self._checkpointing.write_now()
        elif shard.index == 0 and self._context.keeps_checkpoints:
            await self._checkpointing.write_or_retry()

    # Status

    async def status(self) -> RunStatus:
        """The run's status, as Redis and the shards here have it."""
        view = await self.coordinator.opening.read()
        workers, metrics = await self.leases.workers(), await self.reports.newest()
        fields = view.run if view else {}
        telemetry = self._context.telemetry
        tally = Tally.of(view) if view else telemetry.tally
        if self._shards.has_first:
            tally = tally._replace(loss=telemetry.loss, staleness=telemetry.staleness)
        checkpoint_step = self._checkpointing.step if self._shards.has_first else None
        if checkpoint_step is None and "durable_step" in fields:
            checkpoint_step = int(fields["durable_step"])
        lowest = self._shards.lowest
        if lowest is not None:
            rates = lowest.core.shard.scheduled_lr
        else:
            rates = json.loads(view.field(0, "scheduled_lr") or "null") if view else None
        return RunStatus(
            run=self.name,
            id=self._context.origin.id or None,
            epoch=self.epoch,
            step=lowest.core.writer.applied_step if lowest else view.number("step") if view else 0,
            initialized=self._shards.initialized if lowest else fields.get("initialized") == "1",
            spec=self.spec,
            workers=workers,
            pushes=tally.pushes,
            loss=tally.loss,
            staleness=tally.staleness,
            outliers=json.loads(fields.get("outliers", "{}")),
            banned=sorted(json.loads(fields.get("banned", "{}"))),
            control=Control.of(fields).as_seen(self._ownership.redis_ms),
            metrics=metrics,
            data=progress_of(fields),
            scheduled_lr=dict(zip(self.spec.group_names(), rates or (), strict=False)),
            checkpoint_step=checkpoint_step,
            parameter_count=self.manifest.numel,
            shards=self.count,
        )

    async def topology(self) -> Topology:
        """Where the shards are."""
        view = await self.coordinator.opening.read()
        if view is None:
            self._ownership.require_open()
            raise not_open(self.name, list(range(self.count)))
        applied = {
            shard.index: shard.core.writer.applied_step for shard in self._shards if shard.core.loaded is not None
        }
        # Redis's clock at the last heartbeat.
        now_ms = self._ownership.view.now_ms if self._ownership.view else 0
        layout = await self.layout(view.count)
        return topology(self.name, layout, view, now_ms, applied, journaled=self._context.keeps_journal)

    async def layout(self, count: int) -> Layout:
        """The parts of `count` shards; those of the newest number that was asked for are kept."""
        if self._layout is None or self._layout.count != count:
            self._layout = await asyncio.to_thread(Layout, self.manifest, count)
        return self._layout

    # Checkpoints

    async def checkpoint(self) -> Checkpoint:
        """Writes a checkpoint now. Pushes wait for the copy of the state, not for the disk."""
        return await self._checkpointing.write_now()

    async def list_checkpoints(self) -> list[Checkpoint]:
        """The complete ones, oldest first."""
        return await self._context.resources.disk.run(self._checkpoints.all)

    async def restore(self, step: int) -> None:
        """Goes back to the checkpoint of a step, in a new epoch.

        Raises CheckpointNotFound, and StorageUnavailable before anything is changed.
        """
        disk = self._context.resources.disk
        await disk.run(self._context.resources.storage.require_writable)
        identity = await disk.run(self._checkpoints.at, step)
        try:
            # What other processes have to load they look at when they do.
            await self._loading.prefetch(identity)
            await self._restore(identity)
        finally:
            self._loading.forget_prefetched()
        logger.info("run %s went back to the checkpoint of step %d", self.name, step, extra={"step": step})
        # So that a crash from here on returns to this state and not to one that was given up.
        if self._context.keeps_checkpoints:
            await self._checkpointing.write_or_retry()

    async def _restore(self, identity: CheckpointId) -> None:
        opening = self.coordinator.opening
        async with self._ownership.opening("a restore"):
            generation = await opening.gather(self.count)
            view = await opening.read()
            # Beyond a restore that failed halfway too: Redis may have granted leases in its epoch.
            last = max(await self._stored.last_epoch(), view.number("epoch") if view else 0)
            decision = Decision(last + 1, identity, initialized=True)
            if view is None or not await self._loading.open(view.of_generation(generation), decision, identity):
                raise ShardUnavailable("the run was opened otherwise in the meantime")
        if self.epoch < decision.epoch:
            raise CheckpointNotFound(f"the checkpoint of step {identity.step} is damaged", step=identity.step)

    async def reshard(self, shards: int) -> None:
        """Divides the run into another number of shards, in a new epoch; nothing that was applied is lost.

        Raises InvalidSpec, ShardUnavailable, and StorageUnavailable where the state cannot be written.
        """
        if not self._context.keeps_checkpoints:
            raise InvalidSpec("a run without checkpoints cannot be divided anew", field="durability")
        if shards == self.count:
            return
        if self.spec.optimizer.needs_loss:
            raise InvalidSpec(
                "the algorithm's step size needs sums over all parameters, and has them in one shard", field="shards"
            )
        if shards > self.spec.most_shards:
            raise InvalidSpec(
                f"at most {self.spec.most_shards}, for as many pushes as 'krum' compares here", field="shards"
            )
        await self._context.resources.disk.run(self._context.resources.storage.require_writable)
        async with self._ownership.opening("a division into other shards"):
            await self.coordinator.opening.gather(self.count, resharding=shards)
        if self.count != shards:
            if self._standing.problem is not None:
                raise StorageUnavailable(self._standing.problem)
            raise ShardUnavailable("a shard was lost, or could not be written, while the run was divided anew")
