"""When and how a run's checkpoints are written: by its one shard, or by all shards, each its part of one cut."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from freestep.api.models import Checkpoint
from freestep.errors import CoordinatorUnavailable, FreestepError, ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.records import CheckpointId, Fenced, Receipts
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.settings import Settings
from freestep_service.state.shard import Entry, StateCopy
from freestep_service.storage.checkpoints import Checkpoints

__all__ = ["Checkpointing"]

logger = logging.getLogger("freestep")

_PAUSE_AFTER_FAILURE_S = 10.0
"""Before a checkpoint that could not be written, on a full disk say, is tried again in the background."""
_OTHERS_S = 20.0
"""How long a checkpoint is waited for that other processes write."""
_POLL_S = 1.0
"""How long it is listened for before Redis is asked for it."""


class _Host(Protocol):
    """What is asked of the run."""

    name: str
    manifest: Manifest
    coordinator: Coordinator

    @property
    def owned(self) -> Mapping[int, LocalShard]:
        """The shards that this process owns."""

    @property
    def many(self) -> bool:
        """Whether the run has several shards."""

    def shard(self, index: int) -> LocalShard:
        """Raises ShardUnavailable."""

    def fenced(self) -> None:
        """Somebody else owns a shard."""

    async def catch_up(self) -> None:
        """Reads what of the log was not heard."""


class Checkpointing:
    """The checkpoints of one run in the making."""

    def __init__(
        self, host: _Host, checkpoints: Checkpoints, receipts: Receipts, settings: Settings, metrics: RunMetrics
    ) -> None:
        self.lock = asyncio.Lock()
        """Held while one is being written."""
        self._host = host
        self._checkpoints = checkpoints
        self._receipts = receipts
        self._settings = settings
        self._metrics = metrics
        self._last: tuple[int | None, float] = (None, time.monotonic())
        self._not_before = 0.0
        self._durable: dict[CheckpointId, asyncio.Future[None]] = {}
        self._writing: set[asyncio.Task[None]] = set()

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint that this process knows of."""
        return self._last[0]

    def went_back_to(self, cut: CheckpointId) -> None:
        """The run goes on from a checkpoint."""
        self._last = (cut.step, time.monotonic())

    def is_due(self, step: int) -> bool:
        """Whether enough steps, or enough time with any step in it, have passed since the last checkpoint."""
        last, at = self._last
        steps, now = step - (last or 0), time.monotonic()
        if self.lock.locked() or now < self._not_before:
            return False
        return steps >= self._settings.checkpoint_steps or (steps > 0 and now - at >= self._settings.checkpoint_seconds)

    def give_up(self) -> None:
        """Waits for no other shard's part any longer."""
        for waiter in self._durable.values():
            if not waiter.done():
                waiter.set_exception(ShardUnavailable("the process that waited for the checkpoint is being stopped"))

    async def settle(self) -> None:
        """Returns when no part is being written any more."""
        self.give_up()
        await asyncio.gather(*self._writing, return_exceptions=True)

    async def write_now(self) -> Checkpoint:
        """Writes a checkpoint now. Pushes wait for the copy of the state, not for the disk."""
        async with self.lock:
            began = time.monotonic()
            self._not_before = began + _PAUSE_AFTER_FAILURE_S
            cut = await (self._write_parts() if self._host.many else self._write_whole())
            self._last = (cut.step, time.monotonic())
            self._not_before = 0.0
            self._metrics.checkpointed(cut.step, time.monotonic() - began)
        for written in await asyncio.to_thread(self._checkpoints.all):
            if (written.epoch, written.step) == cut[:2]:
                return written
        raise ShardUnavailable("the checkpoint was dropped while it was being written")

    async def _write_whole(self) -> CheckpointId:
        owned = self._host.shard(0)
        cut = await owned.writer.run(owned.shard.copy_state)
        identifier = CheckpointId(cut.epoch, cut.step, cut.seq)
        size = await self.write(owned, cut)
        await asyncio.to_thread(self._checkpoints.complete, identifier)
        with suppress(CoordinatorUnavailable, Fenced):
            await self._host.coordinator.log.part_written(owned.owner(), identifier, size)
        return identifier

    async def _write_parts(self) -> CheckpointId:
        """Has every shard write its part of one cut; returns when all are on disk."""
        owned = next(iter(self._host.owned.values()), None)
        if owned is None:
            raise ShardUnavailable("this process owns no shard of the run")
        before = await self._host.coordinator.opening.read()
        try:
            cut = await self._host.coordinator.log.mark_checkpoint(owned.owner())
        except Fenced:
            raise ShardUnavailable from None
        durable = self._durable.setdefault(cut, asyncio.get_running_loop().create_future())
        await self._host.catch_up()
        try:
            async with asyncio.timeout(_OTHERS_S + self._settings.queue_seconds):
                while not (await asyncio.wait([durable], timeout=_POLL_S))[0]:
                    standing = await self._host.coordinator.opening.read()
                    if standing is not None and standing.run.get("durable") == str(cut):
                        await self.note_durable(str(cut))
                    elif standing is None or before is None or standing.generation != before.generation:
                        raise ShardUnavailable("the run was opened again before all shards had written their parts")
            durable.result()
        except TimeoutError:
            raise ShardUnavailable("a shard has not written its part of the checkpoint in time") from None
        finally:
            self._durable.pop(cut, None)
        return cut

    def keep_cut(self, owned: LocalShard, entry: Entry) -> None:
        """Copies a shard's state as an entry left it, and writes it."""
        copied = owned.writer.call(owned.shard.copy_state)
        task = asyncio.get_running_loop().create_task(self._write_part(owned, copied))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write_part(self, owned: LocalShard, copied: asyncio.Future[StateCopy]) -> None:
        try:
            cut = await copied
            size = await self.write(owned, cut)
            await self._host.coordinator.log.part_written(
                owned.owner(), CheckpointId(cut.epoch, cut.step, cut.seq), size
            )
        except Fenced:
            self._host.fenced()
        except (FreestepError, OSError):
            logger.exception(
                "run %s: shard %d's part of a checkpoint could not be written", self._host.name, owned.index
            )

    async def write(self, owned: LocalShard, cut: StateCopy) -> int:
        receipts = self._receipts.until(cut.seq)
        begin, end = owned.manifest.begin, owned.manifest.end
        return await asyncio.to_thread(self._checkpoints.write, cut, begin, end, self._host.manifest.numel, receipts)

    async def note_durable(self, text: str) -> None:
        cut = CheckpointId(*map(int, text.split("-")))
        await asyncio.to_thread(self._checkpoints.complete, cut)
        self._last = (cut.step, time.monotonic())
        if (waiter := self._durable.get(cut)) is not None and not waiter.done():
            waiter.set_result(None)
