"""What is remembered of the deletion of a run, so that nobody takes a new run of its name for it.

The law of this file: one script deletes a run (lua/delete.lua), and what remembers that is written afterwards, by all
who hear of it. So a deletion that fails has changed nothing, and nothing is noted of a run that lives.

It is noted in Redis, for processes with storage of their own, and in storage, for when Redis has lost it. A new run of
the name begins with the next epoch: no lease, step, ETag or checkpoint of the deleted run is then valid for it.

The newest deletions are known by name, so that a process that has missed one does not take the run for one that Redis
has lost.
Of older ones the largest epoch is kept, and a new run of whatever name begins beyond it.
"""

from __future__ import annotations

from freestep_service.coordination.opening import note_deletion, read_deletion
from freestep_service.runs.resources import Resources
from freestep_service.storage.run_files import LastEpochs

__all__ = ["Deletions"]


class Deletions:
    """The deletions of runs of one name. Methods raise CoordinatorUnavailable, StorageUnavailable and Damaged."""

    def __init__(self, resources: Resources, run: str) -> None:
        self._store = resources.store
        self._disk = resources.disk
        self._last_epochs = LastEpochs(resources.storage)
        self._run = run

    async def last_epoch(self) -> int:
        """The last epoch of the run of this name that was deleted last; 0 where none was, as far as is known."""
        stored = await self._disk.run(self._last_epochs.read, self._run)
        return max(stored, (await read_deletion(self._store, self._run))[0])

    async def first_epoch(self) -> int:
        """The epoch in which a new run of this name begins."""
        stored = await self._disk.run(self._last_epochs.read_forgotten)
        _, forgotten = await read_deletion(self._store, self._run)
        return 1 + max(await self.last_epoch(), stored, forgotten)

    async def note(self, epoch: int) -> None:
        """Notes that a run was deleted, whose last epoch this was. May be called again, and by several processes."""
        await self._disk.run(self._last_epochs.note, self._run, epoch)
        await self.note_in_redis(epoch)

    async def note_in_redis(self, epoch: int) -> None:
        """As `note`, of a run that storage has never known."""
        await note_deletion(self._store, self._run, epoch)
