"""The end of a run in this process: given up in order, so that others go on with it, or deleted.

The law of this file: a run is deleted in Redis, by one script, before anything of it is noted or removed; so a deletion
that fails has changed nothing. Whoever hears of it gives up what it has of the run, then notes its last epoch, then
removes what is of that epoch or an earlier one, and the run file last, by which the next start finds what is left. What
fails on the way may be done again.
"""

from __future__ import annotations

import logging

from freestep.errors import CoordinatorUnavailable, ShardUnavailable, StorageUnavailable
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.deletions import Deletions
from freestep_service.runs.keeper import Keeper
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.ownership import Ownership
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.resources import Resources
from freestep_service.runs.run_memory import RunMemory
from freestep_service.runs.stored_states import StoredStates
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import remove_journals

__all__ = ["Ending", "remove_remnants"]

logger = logging.getLogger("freestep")


class Ending:
    """How one run ends in this process."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        memory: RunMemory,
        stored: StoredStates,
        checkpoints: Checkpoints,
        checkpointing: Checkpointing,
        ownership: Ownership,
        keeper: Keeper,
    ) -> None:
        self.problem: str | None = None
        """Why what is left of the run, once it is deleted, is not removed yet."""
        self._context = context
        self._resources = context.resources
        self._recovery = recovery
        self._shards = shards
        self._memory = memory
        self._stored = stored
        self._checkpoints = checkpoints
        self._checkpointing = checkpointing
        self._ownership = ownership
        self._keeper = keeper
        self._deletions = Deletions(context.resources, context.name)

    async def close(self) -> None:
        """Writes the last checkpoint and gives up what is owned; nothing may be asked of the run any more."""
        self._checkpointing.give_up()
        await self._keeper.stop()
        self._recovery.reopened(ShardUnavailable("the run is being closed"))
        async with self._ownership.lock("its end"):
            self._ownership.is_closed = True
            self._memory.close()
            await self._context.background.settle()
            await self._ownership.give_up_all()

    async def delete(self, run_id: str = "") -> None:
        """Deletes the run in Redis; `forget` is to follow.

        run_id: the only run of the name that may be deleted; empty for any. Raises RunNotFound where another has the
        name by now, StorageUnavailable where its files could not be removed, and CoordinatorUnavailable: nothing has
        changed then, unless only Redis's answer was lost. In that case the next heartbeat finds the run deleted.
        """
        disk = self._resources.disk
        await disk.run(self._resources.storage.require_writable)
        await disk.run(self._checkpoints.require_removable)
        async with self._ownership.lock("its deletion"):
            if self._ownership.is_gone:
                return
            # Where its files are lost, Redis alone knows the epoch.
            last = max(
                await self._stored.last_epoch(), await disk.run(self._checkpoints.newest_epoch), self._ownership.epoch
            )
            self._recovery.is_deleted = True
            try:
                self._ownership.end(await self._context.coordinator.opening.delete(last, run_id))
            except BaseException:
                self._recovery.is_deleted = False
                raise

    async def forget(self) -> None:
        """Ends a run that is gone: notes that, and removes what is left of it where this process can.

        Raises CoordinatorUnavailable and StorageUnavailable, which are then the run's problem. May be called again.
        """
        self._recovery.is_deleted = True
        await self._let_go()
        last, disk = self._ownership.ended_in, self._resources.disk
        try:
            await self._deletions.note(last)
            await disk.run(remove_journals, self._context.settings.journals() / self._context.name, last, damaged=True)
            try:
                await self._context.history.forget()
            finally:
                # Last, since by the run file the next start finds what is left.
                await disk.run(self._checkpoints.remove, last)
        except (CoordinatorUnavailable, StorageUnavailable) as error:
            detail = f"it is deleted, and what is left of it is not removed yet: {error}"
            if detail != self.problem:
                logger.warning("run %s: %s", self._context.name, detail)
            self.problem = detail
            raise
        self.problem = None
        self._context.telemetry.forget()

    async def _let_go(self) -> None:
        """Ends what is done for it here, and gives up what is owned as it is."""
        self._checkpointing.give_up()
        self._memory.close()
        await self._keeper.stop()
        self._recovery.reopened(ShardUnavailable("the run is being deleted"))
        async with self._ownership.lock("its end"):
            self._ownership.is_closed = True
            for shard in self._shards:
                await shard.close_pushes()
            self._context.history.end()
            async with self._checkpointing.lock:
                await self._context.background.settle()
            await self._ownership.drop_all()


async def remove_remnants(resources: Resources, name: str) -> None:
    """Removes what a deletion has left that was cut short, or of which this process did not hear.

    What cannot be removed is logged.
    """
    try:
        if last := await Deletions(resources, name).last_epoch():
            journals = resources.settings.journals() / name
            await resources.disk.run(remove_journals, journals, last, damaged=False)
            await resources.disk.run(Checkpoints(resources.storage, name, 0).remove, last)
    except (Damaged, StorageUnavailable) as error:
        logger.warning("run %s: what is left of it is not removed, though it is deleted: %s", name, error)
