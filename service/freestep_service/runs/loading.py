"""The state of the shards that are owned here: what they say of it, which they load, and what they leave on disk.

The law of this file: nobody says or leaves where a shard stands before it has taken all of the log that there is, and
none loads anything but what was decided for all of them (`opening`). It is called by heartbeats, one at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from freestep.api.models import RunSpec
from freestep.errors import CoordinatorUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.opening import Decision, Report, Waiting, decide
from freestep_service.domain.records import CheckpointId, Fenced, LogPosition, LogTruncated, Receipts, Record, RunState
from freestep_service.domain.reports import Reported
from freestep_service.domain.run_view import RunView
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import Storage
from freestep_service.storage.run_files import RunFile

__all__ = ["Loading"]

logger = logging.getLogger("freestep")

_CATCHING_UP_S = 3.0
"""How long a shard that stops for an opening waits for entries of the log that it has not got."""
_POLL_S = 0.05


class _Host(Protocol):
    """What is asked of the run."""

    name: str
    spec: RunSpec
    canonical_spec: str
    manifest: Manifest
    coordinator: Coordinator

    @property
    def owned(self) -> Mapping[int, LocalShard]:
        """The shards that this process owns."""

    @property
    def count(self) -> int:
        """How many shards the run has."""

    @property
    def many(self) -> bool:
        """Whether it has several."""

    @property
    def epoch(self) -> int:
        """The newest that is known here."""

    @property
    def step(self) -> int:
        """The newest that is known here."""


class Loading:
    """What the owned shards of one run say, load and leave."""

    def __init__(
        self,
        host: _Host,
        checkpoints: Checkpoints,
        storage: Storage,
        receipts: Receipts,
        checkpointing: Checkpointing,
        metrics: RunMetrics,
    ) -> None:
        self.openings = 0
        """How often a shard has loaded what was decided."""
        self.newest_epoch = 0
        """The newest in which a shard has done so."""
        self._host = host
        self._checkpoints = checkpoints
        self._storage = storage
        self._receipts = receipts
        self._checkpointing = checkpointing
        self._metrics = metrics

    # Gather

    async def report(self, standing: RunView, mine: Sequence[LocalShard]) -> bool:
        """Says where the owned shards stand; whether the run goes on to the next phase with that."""
        reports, coordinator = None, self._host.coordinator
        for owned in mine:
            report = await self._stand(owned, standing)
            reports = await coordinator.opening.report_shard(owned.owner(), standing.generation, report.to_json())
        if reports is None:
            return False
        parsed = [Report.from_json(report) for report in reports]
        if shards := standing.number("resharding"):
            places = {(report.live, report.initialized) for report in parsed}
            if len(places) == 1 and parsed[0].live is not None:
                await coordinator.opening.reshard(standing.generation, shards)
                return True
        try:
            decision = decide(standing, parsed)
        except Waiting as reason:
            logger.error("run %s cannot be opened: %s", self._host.name, reason)
            return False
        return await self.open(standing, decision)

    async def _stand(self, owned: LocalShard, standing: RunView) -> Report:
        """Where a shard stands, once it has taken what there is of the log."""
        writer, live, closed = owned.writer, None, None
        is_lost = "lost" in standing.run or (standing.number("epoch"), standing.number("seq")) < owned.known
        if owned.loaded is not None:
            if is_lost:
                writer.pause(forget=True)
            elif owned.initialized and standing.number("epoch") == writer.epoch:
                await self._take_all(owned, standing.number("seq"))
            seq, step, _ = await writer.run(owned.shard.position)
            live = CheckpointId(writer.epoch, step, seq)
            if not is_lost and (live.epoch, live.seq) != (standing.number("epoch"), standing.number("seq")):
                # Entries of the log are missing here: from there it cannot go on.
                live = owned.loaded = None
            elif "resharding" in standing.run and owned.initialized:
                size = await self._checkpointing.write(owned, await writer.run(owned.shard.copy_state))
                await self._host.coordinator.log.part_written(owned.owner(), live, size)
        begin, end = owned.manifest.begin, owned.manifest.end
        offers: list[CheckpointId] = []
        if self._host.spec.durability == "checkpoint":
            offers = await self.offers(owned.index, self._host.count)
            if live is None and (left := await asyncio.to_thread(self._checkpoints.closed, begin, end)):
                closed = LogPosition(*left)
        epoch = max(self.newest_epoch, writer.epoch, (await self._stored())[0])
        return Report(epoch, owned.initialized, live, closed, offers)

    async def offers(self, index: int, count: int) -> list[CheckpointId]:
        """The checkpoints that a shard could be loaded from here, oldest first."""
        part = self._host.manifest.part(index, count)
        return await asyncio.to_thread(self._checkpoints.offers, part.begin, part.end)

    async def last_epoch(self) -> int:
        """The newest epoch that is known here or in storage."""
        stored, _ = await self._stored()
        return max(self._host.epoch, self.newest_epoch, stored)

    async def _stored(self) -> tuple[int, int]:
        """The epoch and the number of shards that storage knows of."""
        try:
            file = await asyncio.to_thread(RunFile.read, self._storage, self._host.name)
        except (OSError, ValueError):
            return 0, 0
        return file.epoch, file.shards

    async def _take_all(self, owned: LocalShard, seq: int) -> None:
        """Has a shard take the log up to an entry, or as much of it as there is."""
        with suppress(TimeoutError, LogTruncated):
            async with asyncio.timeout(_CATCHING_UP_S):
                while owned.writer.taken_seq < seq:
                    taken = LogPosition(owned.writer.epoch, owned.writer.taken_seq)
                    entries = await self._host.coordinator.log.entries(taken)
                    if not all([owned.hear(entry) for entry in entries]):
                        return
                    await asyncio.sleep(_POLL_S)

    # Load

    async def open(self, standing: RunView, decision: Decision) -> bool:
        """Has all shards load what was decided; whether that is what they now do."""
        cut = decision.cut
        receipts: Mapping[str, Record] = {}
        group: Mapping[str, int] = {}
        reported: Reported = {}
        if decision.live and self._host.owned:
            held = next((owned for owned in self._host.owned.values() if owned.loaded is not None), None)
            if held is not None:
                _, _, group = await held.writer.run(held.shard.position)
                reported = await held.writer.run(held.shard.reported)
                receipts = self._receipts.until(cut.seq if cut else 0)
        if decision.initialized and cut is not None and not (receipts or group or reported):
            loaded = await self._load_cut(cut, 0, 0)
            if loaded is None and not decision.live:
                await self._host.coordinator.opening.gather(self._host.count, standing.generation)
                return True
            if loaded is not None:
                group, reported, receipts = loaded[0].group, loaded[0].reported, loaded[1]
        place = cut or CheckpointId(decision.epoch, 0, 0)
        state = RunState(decision.epoch, place.step, place.seq, decision.initialized, group, receipts, reported)
        return await self._host.coordinator.opening.open(
            state, self._host.count, standing.generation, decision.target()
        )

    async def load(self, standing: RunView, mine: Sequence[LocalShard]) -> bool:
        """Takes the state that was decided on; whether the run goes on to the next phase with that."""
        host, target, generation = self._host, standing.target(), standing.generation
        cut = None if target["cut"] is None else CheckpointId(*target["cut"])
        epoch = standing.number("epoch")
        initialized = standing.number("initialized") == 1
        opened = False
        if await self._stored() != (epoch, host.count):
            file = RunFile(host.canonical_spec, epoch, host.count)
            await asyncio.to_thread(file.write, self._storage, host.name)
        for owned in mine:
            if owned.loaded == generation:
                continue
            holds = target["live"] and owned.loaded is not None
            if not await self._take(owned, None if holds else cut, epoch, initialized, holds=holds):
                await host.coordinator.opening.gather(host.count, generation)
                return True
            owned.loaded = generation
            self.openings += 1
            if await host.coordinator.opening.loaded(owned.owner(), generation) == "open":
                opened = True
        if cut is not None and initialized and not target["live"]:
            self._checkpointing.went_back_to(cut)
        self.newest_epoch = max(self.newest_epoch, epoch)
        self._metrics.at(host.epoch, host.step)
        if opened:
            logger.info("run %s is open: epoch %d, step %d", host.name, host.epoch, host.step)
        return opened

    async def _take(
        self, owned: LocalShard, cut: CheckpointId | None, epoch: int, initialized: bool, *, holds: bool
    ) -> bool:
        """Brings a shard to a cut, to what it holds or to nothing; False where the cut is damaged."""
        writer, begin, end = owned.writer, owned.manifest.begin, owned.manifest.end
        await owned.prepare()
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
        if owned.index == 0:
            self._metrics.restored(await writer.run(owned.shard.reported))
        if not initialized:
            # Entries wait until the weights are there.
            writer.pause()
        return True

    def _keep_receipts(self, receipts: dict[str, Record]) -> None:
        self._receipts.clear()
        self._receipts.update(receipts)

    async def _load_cut(self, cut: CheckpointId, begin: int, end: int) -> tuple[StateCopy, dict[str, Record]] | None:
        try:
            return await asyncio.to_thread(self._checkpoints.load, cut, begin, end)
        except Damaged:
            return None

    # Leave

    async def leave(self, owned: LocalShard, standing: RunView | None) -> None:
        """Closes a shard's pushes and leaves its state on disk; `standing`: None where Redis cannot be reached."""
        if owned.initialized and standing is not None and standing.number("epoch") == owned.writer.epoch:
            await self._take_all(owned, standing.number("seq"))
        # What Redis has not decided by now it will not, or, where it cannot be reached, nobody knows.
        settled = await owned.pushes.close() or standing is not None
        if not owned.initialized or self._host.spec.durability != "checkpoint":
            return
        cut = await owned.writer.run(owned.shard.copy_state)
        size = await self._checkpointing.write(owned, cut)
        identifier = CheckpointId(cut.epoch, cut.step, cut.seq)
        durable = not self._host.many
        with suppress(CoordinatorUnavailable, Fenced):
            durable = await self._host.coordinator.log.part_written(owned.owner(), identifier, size) or durable
        if durable:
            await asyncio.to_thread(self._checkpoints.complete, identifier)
        if settled and cut.seq == owned.writer.known_seq:
            begin, end = owned.manifest.begin, owned.manifest.end
            await asyncio.to_thread(self._checkpoints.mark_closed, begin, end, cut.epoch, cut.seq)
