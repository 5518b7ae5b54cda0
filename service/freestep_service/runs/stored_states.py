"""What is known here of a run's states beside Redis: which storage and journals hold, and in which epochs they are.

The law of this file: where what is here is older than what the run could go on from, it says why a shard is not to be
taken here, and what to do; and nothing that is asked of it changes a state.
"""

from __future__ import annotations

import logging
from math import inf

from freestep.errors import FreestepError, StorageUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.domain.run_view import RunView
from freestep_service.runs.context import RunContext
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.journal_files import is_journal_here
from freestep_service.storage.part_manifest import part_name
from freestep_service.storage.run_files import RunFile

__all__ = ["StoredStates"]

logger = logging.getLogger("freestep")


class StoredStates:
    """The states of one run that are in storage, and in journals here."""

    def __init__(self, context: RunContext, shards: OwnedShards, checkpoints: Checkpoints) -> None:
        self.newest_epoch = 0
        """The newest in which a shard has loaded its state."""
        self._context = context
        self._disk = context.resources.disk
        self._shards = shards
        self._checkpoints = checkpoints

    async def offers(self, index: int, count: int) -> list[CheckpointId]:
        """The checkpoints that a shard could be loaded from here, oldest first."""
        part = self._context.manifest.part(index, count)
        return await self._disk.run(self._checkpoints.offers, part.begin, part.end)

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
        stored, _ = await self.recorded()
        return max(self._shards.epoch, self.newest_epoch, stored)

    async def recorded(self) -> tuple[int, int]:
        """The epoch and the number of shards that storage knows of. Raises NewerFormat."""
        try:
            file = await self._disk.run(RunFile.read, self._context.resources.storage, self._context.name)
        except NewerFormat:
            # It is not to be replaced.
            raise
        except (FileNotFoundError, Damaged, StorageUnavailable):
            return 0, 0
        return file.epoch, file.shards

    async def note_epoch(self, epoch: int) -> None:
        """Notes the epoch in storage. Where that fails the run opens all the same: checkpoints hold their epochs."""
        if await self.recorded() == (epoch, self._shards.count):
            return
        file = RunFile(self._context.canonical_spec, epoch, self._shards.count, *self._context.origin)
        try:
            await self._disk.run(file.write, self._context.resources.storage, self._context.name)
        except FreestepError as error:
            logger.warning("run %s: its run file was not written: %s", self._context.name, error)
