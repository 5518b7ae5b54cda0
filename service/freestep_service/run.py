"""One run: the shards of it that this process owns, its part of Redis and its checkpoints, kept in step."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import torch

from freestep.errors import (
    CheckpointNotFound,
    CoordinatorUnavailable,
    InvalidSpec,
    RunExists,
    RunNotFound,
    RunNotInitialized,
    ShardUnavailable,
    StepNotReached,
)
from freestep.models import Checkpoint, RunSpec, RunStatus, Topology
from freestep.wire import Manifest
from freestep_service.aggregation import Policy
from freestep_service.checkpointing import Checkpointing
from freestep_service.checkpoints import Checkpoints, Damaged, LastEpochs, RunFile
from freestep_service.coordinator import Coordinator, not_open
from freestep_service.ingest import Body
from freestep_service.leases import Leases
from freestep_service.messages import Messages
from freestep_service.metrics import RunMetrics
from freestep_service.nodes import Grace, Node
from freestep_service.opening import Decision, Report, Waiting, decide
from freestep_service.owned import OwnedShard
from freestep_service.pushes import Receipts, Wish, stage
from freestep_service.records import Claim, CutId, Fenced, Known, Record, RunState, Standing
from freestep_service.settings import Settings
from freestep_service.shard import Cut
from freestep_service.snapshots import Reading, Snapshot
from freestep_service.storage import Storage
from freestep_service.store import Store
from freestep_service.topology import topology
from freestep_service.turns import Turns
from freestep_service.vectors import Vector, VectorPool
from freestep_service.writer import Writer

__all__ = ["Run"]

logger = logging.getLogger("freestep")

_OPENING_S = 20.0
"""How long a request waits for a run that is being opened."""
_CATCHING_UP_S = 3.0
"""How long a shard that stops for an opening waits for entries of the log that it has not got."""
_POLL_S = 0.05


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
        messages: Messages,
        device: torch.device,
        turns: Turns,
        metrics: RunMetrics,
    ) -> None:
        self.name = name
        self.spec = spec
        self.canonical_spec = spec.model_dump_json()
        self.manifest = Manifest(spec.parameters)
        self.count = shards
        self.owned: dict[int, OwnedShard] = {}
        self.is_gone = False
        """Whether another process has deleted it."""
        self._node = node
        self._store = store
        self._settings = settings
        self._storage = storage
        self._messages = messages
        self._device = device
        self._turns = turns
        self._metrics = metrics
        self.coordinator = Coordinator(store, name, self.canonical_spec, Policy.of(spec.aggregation))
        self._checkpoints = Checkpoints(storage, name, settings.checkpoints_kept)
        self._last_epochs = LastEpochs(storage)
        self._receipts = Receipts()
        patience_ms = int(1000 * settings.stall_seconds)
        self.leases = Leases(self.coordinator, self, self._receipts, metrics, spec.lease_ttl_ms, patience_ms)
        self._whole = VectorPool(self.manifest.numel, 1)
        self._standing: Standing | None = None
        self._missing_since = Grace()
        self._surplus_since = Grace()
        self._newest_epoch = 0
        self._expected_seq = 0
        """The newest entry of the log at the last heartbeat."""
        self._keeping = asyncio.Lock()
        self._openings = 0
        self._troubled = False
        self.checkpointing = Checkpointing(self, self._checkpoints, self._receipts, settings, metrics)
        self._background: set[asyncio.Task[Any]] = set()
        self._closed = False

    # What its parts ask of it

    @property
    def many(self) -> bool:
        """Whether there are several shards."""
        return self.count > 1

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
        opening = self._openings
        async with self._keeping:
            self._require_open()
            if self._openings != opening:
                return
            try:
                await self.coordinator.gather(self.count)
                standing = await self._keep()
            except Fenced:
                standing = await self.coordinator.read()
            if standing is None or standing.phase != "open":
                raise not_open(self.name, standing.missing() if standing else [])

    async def catch_up(self) -> None:
        """Reads what of the log was not heard."""
        if self.owned:
            after = min(owned.writer.taken_seq for owned in self.owned.values())
            for entry in await self.coordinator.entries(after):
                self._hear_entry(entry)

    # Opening

    async def create(self) -> None:
        """Starts as a new run, which waits for its initial weights. Raises RunExists."""
        epoch = await asyncio.to_thread(self._last_epochs.read, self.name) + 1
        if await self.coordinator.create(epoch, self.count) == "different":
            raise RunExists(f"the run {self.name!r} exists with another spec", run=self.name)
        await asyncio.to_thread(RunFile(self.canonical_spec, epoch, self.count).write, self._storage, self.name)

    async def keep(self) -> None:
        """A heartbeat: keeps what is owned, takes what nobody owns, and helps the run to open."""
        async with self._keeping:
            if not self._closed:
                try:
                    await self._keep()
                except (CoordinatorUnavailable, Fenced):
                    # The next one may reach Redis, and learns who owns what.
                    pass

    async def prolong(self) -> None:
        """As `keep`, or if that takes its time already, no more than to say that this process lives."""
        if not self._keeping.locked():
            await self.keep()
        elif self.owned:
            with suppress(CoordinatorUnavailable):
                await self.coordinator.own(self._node.id, self._node.url, self._node.ttl_ms, (), {})

    async def _keep(self) -> Standing | None:
        """As `keep`; how the run stands then, None where it is gone."""
        standing = await self._own()
        while standing is not None:
            await self._change_owned(standing)
            if wanted := await self._wanted(standing):
                standing = await self._own(wanted)
                continue
            if standing.phase == "gather" and self.owned and await self._report(standing):
                standing = await self._own()
                continue
            if standing.phase == "load" and await self._load(standing):
                standing = await self._own()
                continue
            if standing.phase == "open":
                await self._even_out(standing)
            break
        return standing

    async def _own(self, wanted: Iterable[int] = ()) -> Standing | None:
        known = max((owned.known for owned in self.owned.values()), default=Known(0, 0))
        says = {f"{index}:applied": str(owned.writer.applied_step) for index, owned in self.owned.items()}
        if self.leads and self._metrics.loss is not None:
            says["0:loss"] = repr(self._metrics.loss)
        if self.leads and self._metrics.staleness is not None:
            says["0:staleness"] = repr(self._metrics.staleness)
        node = self._node
        standing = await self.coordinator.own(node.id, node.url, node.ttl_ms, list(wanted), says)
        if standing is None:
            if await asyncio.to_thread(self._last_epochs.read, self.name) >= max(self.epoch, self._newest_epoch, 1):
                self.is_gone = True
                await self._drop(list(self.owned))
                return None
            await self.coordinator.gather(self.count)
            return await self._own(wanted)
        self._standing = standing
        is_behind = (standing.number("epoch"), standing.number("seq")) < known
        if standing.phase == "open" and (is_behind or self._troubled):
            self._troubled = False
            await self.coordinator.gather(self.count, standing.generation)
            return await self._own(wanted)
        if self.owned and self.many and self._expected_seq > known.seq:
            # Its message should have come by now.
            self._spawn(self._catch_up_quietly())
        self._expected_seq = standing.number("seq")
        return standing

    async def _catch_up_quietly(self) -> None:
        with suppress(CoordinatorUnavailable):
            await self.catch_up()

    async def _change_owned(self, standing: Standing) -> None:
        """Lets go the shards that are another's by now, and begins with those that are this process's."""
        is_recut, self.count = standing.count != self.count, standing.count
        owners = {index: standing.said(index, "node") for index in range(standing.count)}
        mine = self._mine(standing)
        # What nobody owns, since Redis has lost that too, or was silent for long, is as good as it was: the log cannot
        # have gone on without it.
        lost = [index for index in self.owned if is_recut or owners[index] not in (self._node.id, None)]
        if lost:
            if not is_recut:
                logger.warning("run %s: shard %s is another process's now", self.name, ", ".join(map(str, lost)))
            await self._drop(lost)
        for index in self.owned.keys() & mine.keys():
            self.owned[index].token = mine[index]
        for index in sorted(mine.keys() - self.owned.keys()):
            device = self._device
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", index % torch.cuda.device_count())
            self.owned[index] = OwnedShard(
                self.name, self.spec, self.manifest, index, self.count, mine[index], device, self.coordinator,
                self._receipts, self._settings, self._turns, self, self.checkpointing.keep_cut,
            )  # fmt: skip
        if self.owned and self.many:
            await self._messages.listen(self.coordinator.channel, self._hear)
        else:
            await self._messages.ignore(self.coordinator.channel)

    def _mine(self, standing: Standing) -> dict[int, str]:
        """The shards that this process owns, as Redis has it, and their tokens."""
        return {
            index: standing.shards[f"{index}:token"]
            for index in range(standing.count)
            if standing.said(index, "node") == self._node.id
        }

    async def _drop(self, indices: Iterable[int]) -> None:
        for index in indices:
            await self.owned.pop(index).close()

    async def _wanted(self, standing: Standing) -> list[int]:
        """The shards to take: those that nobody owns, up to this process's share, or more if others leave them.

        Not those whose checkpoint is where this process cannot read it.
        """
        free = {
            index
            for index in range(standing.count)
            if not standing.is_owned(index)
            or (standing.said(index, "url") == self._node.url and standing.said(index, "node") != self._node.id)
        }
        self._missing_since.note(set(free))
        if free:
            await self._node.beat(self._store)
        # Where Redis has lost its data, others hold the state of what seems free.
        waits = "lost" in standing.run and self._node.others > 0
        left = self._node.share(standing.count) - len(self._mine(standing))
        wanted: list[int] = []
        # Those whose state is still here come first.
        for index in sorted(free, key=lambda index: (index not in self.owned, index)):
            was_mine = index in self.owned or standing.said(index, "url") == self._node.url
            is_left = was_mine or self._missing_since.age(index) > self._node.ttl_ms / 1000
            can_load = index in self.owned or "durable" not in standing.run
            if ((left > 0 and not waits) or is_left) and (can_load or await self._offers(index, standing.count)):
                wanted.append(index)
                left -= 1
        return wanted

    async def _even_out(self, standing: Standing) -> None:
        """Hands over what this process owns beyond its share, once others have long had room for it."""
        mine = sorted(self._mine(standing))
        surplus = mine[self._node.share(standing.count) :] if self.spec.durability == "checkpoint" else []
        self._surplus_since.note({"surplus"} if surplus else set())
        # Beyond the time for which a process that is gone is counted.
        if self._surplus_since.age("surplus") <= 3 * self._node.ttl_ms / 1000:
            return
        logger.info("run %s: shard %s is handed over", self.name, ", ".join(map(str, surplus)))
        await self._give_up({index: self.owned[index] for index in surplus})

    async def _give_up(self, given: Mapping[int, OwnedShard]) -> None:
        """Leaves shards on disk, for others to take where they stand. Nobody pushes meanwhile."""
        standing = None
        with suppress(CoordinatorUnavailable, Fenced):
            if given:
                await self.coordinator.gather(self.count)
                standing = await self.coordinator.read()
        for index, owned in given.items():
            try:
                await self._leave_on_disk(owned, standing)
            except Exception:
                logger.exception("run %s: shard %d could not be written", self.name, index)
        with suppress(CoordinatorUnavailable):
            await self.coordinator.leave([owned.owner() for owned in given.values()])
        await self._drop(given)

    async def _offers(self, index: int, count: int) -> list[CutId]:
        part = self.manifest.part(index, count)
        return await asyncio.to_thread(self._checkpoints.offers, part.begin, part.end)

    async def _report(self, standing: Standing) -> bool:
        """Says where the owned shards stand; whether the run goes on to the next phase with that."""
        reports = None
        for index in self._mine(standing):
            owned = self.owned[index]
            report = await self._stand(owned, standing)
            reports = await self.coordinator.report(owned.owner(), standing.generation, report.to_json())
        if reports is None:
            return False
        parsed = [Report.from_json(report) for report in reports]
        if shards := standing.number("resharding"):
            places = {(report.live, report.initialized) for report in parsed}
            if len(places) == 1 and parsed[0].live is not None:
                await self.coordinator.reshard(standing.generation, shards)
                return True
        try:
            decision = decide(standing, parsed)
        except Waiting as reason:
            logger.error("run %s cannot be opened: %s", self.name, reason)
            return False
        return await self._open(standing, decision)

    async def _stand(self, owned: OwnedShard, standing: Standing) -> Report:
        """Where a shard stands, once it has taken what there is of the log."""
        writer, live, closed = owned.writer, None, None
        is_lost = "lost" in standing.run or (standing.number("epoch"), standing.number("seq")) < owned.known
        if owned.loaded is not None:
            if is_lost:
                writer.pause(forget=True)
            elif owned.initialized and standing.number("epoch") == writer.epoch:
                await self._take_all(owned, standing.number("seq"))
            seq, step, _ = await writer.run(owned.shard.position)
            live = CutId(writer.epoch, step, seq)
            if not is_lost and (live.epoch, live.seq) != (standing.number("epoch"), standing.number("seq")):
                # Entries of the log are missing here: from there it cannot go on.
                live = owned.loaded = None
            elif "resharding" in standing.run and owned.initialized:
                size = await self.checkpointing.write(owned, await writer.run(owned.shard.cut))
                await self.coordinator.written(owned.owner(), live, size)
        begin, end = owned.manifest.begin, owned.manifest.end
        offers: list[CutId] = []
        if self.spec.durability == "checkpoint":
            offers = await self._offers(owned.index, self.count)
            if live is None and (left := await asyncio.to_thread(self._checkpoints.closed, begin, end)):
                closed = Known(*left)
        epoch = max(self._newest_epoch, writer.epoch, (await asyncio.to_thread(self._stored))[0])
        return Report(epoch, owned.initialized, live, closed, offers)

    def _stored(self) -> tuple[int, int]:
        """The epoch and the number of shards that storage knows of."""
        try:
            file = RunFile.read(self._storage, self.name)
        except (OSError, ValueError):
            return 0, 0
        return file.epoch, file.shards

    async def _take_all(self, owned: OwnedShard, seq: int) -> None:
        """Has a shard take the log up to an entry, or as much of it as there is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CATCHING_UP_S):
                while owned.writer.taken_seq < seq:
                    entries = await self.coordinator.entries(owned.writer.taken_seq)
                    if not all([owned.hear(entry) for entry in entries]):
                        return
                    await asyncio.sleep(_POLL_S)

    async def _open(self, standing: Standing, decision: Decision) -> bool:
        """Has all shards load what was decided; whether that is what they now do."""
        cut = decision.cut
        receipts: Mapping[str, Record] = {}
        group: Mapping[str, int] = {}
        if decision.live and self.owned:
            held = next((owned for owned in self.owned.values() if owned.loaded is not None), None)
            if held is not None:
                _, _, group = await held.writer.run(held.shard.position)
                receipts = self._receipts.until(cut.seq if cut else 0)
        if decision.initialized and cut is not None and not receipts and not group:
            loaded = await self._load_cut(cut, 0, 0)
            if loaded is None and not decision.live:
                await self.coordinator.gather(self.count, standing.generation)
                return True
            if loaded is not None:
                group, receipts = loaded[0].group, loaded[1]
        place = cut or CutId(decision.epoch, 0, 0)
        state = RunState(decision.epoch, place.step, place.seq, decision.initialized, group, receipts)
        return await self.coordinator.open(state, self.count, standing.generation, decision.target())

    async def _load(self, standing: Standing) -> bool:
        """Takes the state that was decided on; whether the run goes on to the next phase with that."""
        target, generation = standing.target(), standing.generation
        cut = None if target["cut"] is None else CutId(*target["cut"])
        epoch = standing.number("epoch")
        initialized = standing.number("initialized") == 1
        opened = False
        if await asyncio.to_thread(self._stored) != (epoch, self.count):
            file = RunFile(self.canonical_spec, epoch, self.count)
            await asyncio.to_thread(file.write, self._storage, self.name)
        for index in self._mine(standing):
            owned = self.owned[index]
            if owned.loaded == generation:
                continue
            holds = target["live"] and owned.loaded is not None
            if not await self._take(owned, None if holds else cut, epoch, initialized, holds=holds):
                await self.coordinator.gather(self.count, generation)
                return True
            owned.loaded = generation
            self._openings += 1
            if await self.coordinator.loaded(owned.owner(), generation) == "open":
                opened = True
        if cut is not None and initialized and not target["live"]:
            self.checkpointing.went_back_to(cut)
        self._newest_epoch = max(self._newest_epoch, epoch)
        self._metrics.at(self.epoch, self.step)
        if opened:
            logger.info("run %s is open: epoch %d, step %d", self.name, self.epoch, self.step)
        return opened

    async def _take(self, owned: OwnedShard, cut: CutId | None, epoch: int, initialized: bool, *, holds: bool) -> bool:
        """Brings a shard to a cut, to what it holds or to nothing; False where the cut is damaged."""
        writer, begin, end = owned.writer, owned.manifest.begin, owned.manifest.end
        if holds:
            seq, step, _ = await writer.run(owned.shard.position)
            self._keep_receipts(self._receipts.until(seq))
        else:
            writer.pause()
            seq, step = 0, 0
            if cut is not None and initialized:
                loaded = await self._load_cut(cut, begin, end)
                if loaded is None:
                    return False
                state, receipts = loaded
                await writer.run(owned.shard.load, state, epoch)
                self._keep_receipts(receipts)
                seq, step = state.seq, state.step
            else:
                self._receipts.clear()
        await asyncio.to_thread(self._checkpoints.clear_closed, begin, end)
        owned.initialized = initialized
        writer.resume(epoch, seq, step)
        if not initialized:
            # Entries wait until the weights are there.
            writer.pause()
        return True

    def _keep_receipts(self, receipts: dict[str, Record]) -> None:
        self._receipts.clear()
        self._receipts.update(receipts)

    async def _load_cut(self, cut: CutId, begin: int, end: int) -> tuple[Cut, dict[str, Record]] | None:
        try:
            return await asyncio.to_thread(self._checkpoints.load, cut, begin, end)
        except Damaged:
            return None

    # Messages

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None:
            self._spawn(self._catch_up_quietly())
            self._spawn(self.keep())
            return
        match message["kind"]:
            case "entry":
                self._hear_entry(message)
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
            case "initialized":
                for owned in self.owned.values():
                    owned.uploaded(message["upload"])
            case "evicted":
                self._receipts.forget(message["keys"])
            case "durable":
                self._spawn(self.checkpointing.note_durable(message["cut"]))
            case "phase" | "deleted":
                self._spawn(self.keep())

    def _hear_entry(self, entry: dict[str, Any]) -> None:
        if "key" in entry and self.writer is not None and entry["epoch"] == self.writer.epoch:
            evicted = entry.get("evicted") or ()
            self._receipts.remember(entry["key"], Record.from_json(entry["record"]), evicted)
        for owned in self.owned.values():
            if not owned.hear(entry) and self.many and owned.initialized:
                # A push was committed of which this shard has no part: it cannot go on from here.
                logger.error("run %s: shard %d lacks entry %d of the log", self.name, owned.index, entry["seq"])
                self._troubled = True

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Pushes and pulls

    def owns(self, index: int) -> bool:
        """Whether a shard is this process's."""
        return index in self.owned

    def require_initialized(self, owned: OwnedShard) -> None:
        """Raises RunNotInitialized."""
        if not owned.initialized:
            raise RunNotInitialized

    @asynccontextmanager
    async def staged(self, body: Body) -> AsyncIterator[Vector]:
        """A body of the whole model, as a flat fp32 vector; one at a time. Raises MalformedTensors."""
        vector = await self._whole.acquire()
        try:
            await stage(body, self.manifest, vector, self._turns)
            yield vector
        finally:
            self._whole.release(vector)

    def shard(self, index: int) -> OwnedShard:
        """A shard that this process owns. Raises ShardUnavailable."""
        owned = self.owned.get(index)
        if owned is None or owned.loaded is None:
            self._require_open()
            raise not_open(self.name, self._standing.missing() if self._standing else [])
        return owned

    async def initialize(self, owned: OwnedShard, body: Body, upload: str | None) -> None:
        """Takes a shard's part of the initial weights. Raises AlreadyInitialized for all but the first upload."""
        await owned.initialize(body, upload or secrets.token_hex(16))
        if self.leads and owned.index == 0 and self.spec.durability == "checkpoint":
            await self.checkpoint()

    async def push(
        self, owned: OwnedShard, claim: Claim, body: Body, loss: float | None, wish: Wish
    ) -> tuple[Record, bool]:
        """Carries a push to its decision: its record, and whether that was known before. Raises what pushes.py says."""
        self.require_initialized(owned)
        began = time.monotonic()
        try:
            record, replayed = await owned.pushes.push(claim, body, wish)
        except ShardUnavailable:
            self._require_open()
            raise
        if replayed:
            self._metrics.replayed()
        else:
            self._metrics.received(body.length)
            if owned.index == 0:
                self._metrics.pushed(record, loss, time.monotonic() - began)
            self._metrics.at(self.epoch, self.step)
        return record, replayed

    @asynccontextmanager
    async def read(self, owned: OwnedShard, reading: Reading) -> AsyncIterator[Snapshot]:
        """A shard's part of a point as a body, immutable until the block ends. Raises RunNotInitialized."""
        self.require_initialized(owned)
        try:
            async with owned.read(reading) as snapshot:
                yield snapshot
                self._metrics.sent(snapshot.size)
        except ShardUnavailable:
            self._require_open()
            raise

    async def wait_for(self, owned: OwnedShard, step: int, wait: float) -> None:
        """Returns when a shard has reached a step. Raises StepNotReached after `wait` seconds."""
        if not await owned.writer.reach(step, wait):
            self._require_open()
            raise StepNotReached(f"the run is at step {owned.writer.applied_step}", step=owned.writer.applied_step)

    def _require_open(self) -> None:
        if self._closed or self.is_gone:
            raise RunNotFound(f"there is no run {self.name!r}", run=self.name)

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
        standing = await self.coordinator.read()
        workers = await self.leases.workers()
        fields = standing.run if standing else {}
        loss, staleness = self._metrics.loss, self._metrics.staleness
        if standing and not self.leads:
            loss, staleness = (_number(standing.said(0, name)) for name in ("loss", "staleness"))
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
            checkpoint_step=checkpoint_step,
            parameter_count=self.manifest.numel,
            shards=self.count,
        )

    async def topology(self) -> Topology:
        """Where the shards are."""
        standing = await self.coordinator.read()
        if standing is None:
            self._require_open()
            raise not_open(self.name, list(range(self.count)))
        applied = {index: owned.writer.applied_step for index, owned in self.owned.items() if owned.loaded is not None}
        # Redis's clock: what has run out is said by whoever keeps the run.
        return topology(self.name, self.manifest, standing, self._standing.now_ms if self._standing else 0, applied)

    def owner_url(self, index: int) -> str | None:
        """Where a shard's owner was last known to be, if that is another process."""
        if self._standing is None or self._standing.said(index, "node") == self._node.id:
            return None
        return self._standing.said(index, "url")

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
        for owned in self.owned.values():
            # Before anything is changed. What other processes have to load they look at when they do.
            try:
                await asyncio.to_thread(self._checkpoints.load, cut, owned.manifest.begin, owned.manifest.end)
            except Damaged as error:
                raise CheckpointNotFound(f"the checkpoint of step {step} is damaged: {error}", step=step) from None
        async with self._keeping:
            self._require_open()
            generation = await self.coordinator.gather(self.count)
            standing = await self.coordinator.read()
            # Beyond a restore that failed halfway too: Redis may have granted leases in its epoch.
            stored, _ = await asyncio.to_thread(self._stored)
            epochs = (self.epoch, self._newest_epoch, stored, standing.number("epoch") if standing else 0)
            decision = Decision(max(epochs) + 1, cut, initialized=True)
            if standing is None or not await self._open(_of(standing, generation), decision):
                raise ShardUnavailable("the run was opened otherwise in the meantime")
            await self._keep()
        await self._opened()
        if self.epoch < decision.epoch:
            raise CheckpointNotFound(f"the checkpoint of step {step} is damaged", step=step)
        # So that a crash from here on returns to this state and not to one that was given up.
        if self.spec.durability == "checkpoint":
            await self.checkpoint()

    async def reshard(self, shards: int) -> None:
        """Cuts the run into another number of shards, in a new epoch; nothing that was applied is lost."""
        if self.spec.durability != "checkpoint":
            raise InvalidSpec("a run without checkpoints cannot be cut anew", field="durability")
        if shards == self.count:
            return
        async with self._keeping:
            self._require_open()
            await self.coordinator.gather(self.count, resharding=shards)
            await self._keep()
        await self._opened()
        if self.count != shards:
            raise ShardUnavailable("a shard was lost while the run was being cut anew")

    async def _opened(self) -> None:
        """Returns when the run is open. Raises ShardUnavailable."""
        try:
            async with asyncio.timeout(_OPENING_S):
                while True:
                    await self.keep()
                    standing = await self.coordinator.read()
                    if standing is not None and standing.phase == "open":
                        self.count = standing.count
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise not_open(self.name, self._standing.missing() if self._standing else []) from None

    # The end

    async def close(self) -> None:
        """Writes the last checkpoint and gives up what is owned; nothing may be asked of the run any more."""
        async with self._keeping:
            self._closed = True
            await self.checkpointing.settle()
            await self._give_up(dict(self.owned))
            await self._messages.ignore(self.coordinator.channel)

    async def _leave_on_disk(self, owned: OwnedShard, standing: Standing | None) -> None:
        if owned.initialized and standing is not None and standing.number("epoch") == owned.writer.epoch:
            await self._take_all(owned, standing.number("seq"))
        # What Redis has not decided by now it will not, or, where it cannot be reached, nobody knows.
        settled = await owned.pushes.close() or standing is not None
        if not owned.initialized or self.spec.durability != "checkpoint":
            return
        cut = await owned.writer.run(owned.shard.cut)
        size = await self.checkpointing.write(owned, cut)
        identifier = CutId(cut.epoch, cut.step, cut.seq)
        durable = not self.many
        with suppress(CoordinatorUnavailable, Fenced):
            durable = await self.coordinator.written(owned.owner(), identifier, size) or durable
        if durable:
            await asyncio.to_thread(self._checkpoints.complete, identifier)
        if settled and cut.seq == owned.writer.known_seq:
            begin, end = owned.manifest.begin, owned.manifest.end
            await asyncio.to_thread(self._checkpoints.mark_closed, begin, end, cut.epoch, cut.seq)

    async def delete(self) -> None:
        """Forgets the run: in Redis first, then on disk."""
        # Before Redis forgets the run: who finds it gone there must not write it anew.
        async with self._keeping:
            self._closed = True
            try:
                stored, _ = await asyncio.to_thread(self._stored)
                last = max(self.epoch, self._newest_epoch, stored)
                await asyncio.to_thread(self._last_epochs.write, self.name, last)
                await self.coordinator.delete()
            except (CoordinatorUnavailable, OSError):
                self._closed = False
                raise
            for owned in self.owned.values():
                await owned.pushes.close()
            async with self.checkpointing.lock:
                await self.checkpointing.settle()
                await asyncio.to_thread(self._checkpoints.remove)
            await self.forget()

    async def forget(self) -> None:
        """Lets go of a run that is no more."""
        await self._drop(list(self.owned))
        await self._messages.ignore(self.coordinator.channel)
        self._metrics.forget()


def _of(standing: Standing, generation: int) -> Standing:
    return Standing({**standing.run, "generation": str(generation)}, standing.shards, standing.now_ms)


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
