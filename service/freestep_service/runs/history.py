"""The history of a run, kept by the owner of its first shard: in memory, and in storage beside the checkpoints.

The law of this file: it holds up nothing. Where it is damaged or cannot be read or written, that is logged once, and
the run goes on. It is written every 30 seconds in which something has changed, behind each checkpoint, and whenever the
first shard is left in order; a process that is killed takes with it what came since, except what a journal's replay
tells of again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from freestep.errors import StorageUnavailable
from freestep_service.domain.events import Event
from freestep_service.domain.history import HistoryCurves
from freestep_service.domain.records import Origin
from freestep_service.runs.resources import Disk
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.history_file import HistoryFile
from freestep_service.storage.medium import Storage

__all__ = ["RunHistory"]

logger = logging.getLogger("freestep")

_SAVED_EVERY_S = 30.0
"""Seconds from one writing of it to the next, and from one attempt to read it to the next."""
_PATIENCE_S = 10.0
"""Seconds for which an opening waits for it to be read."""


class RunHistory:
    """The history of one run.

    origin: where the run began. now: the time, in seconds since 1970. clock: one that never goes back, in seconds.
    patience_s: for how long an opening waits for it to be read.
    """

    def __init__(
        self,
        storage: Storage,
        disk: Disk,
        run: str,
        origin: Origin,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.failure: str | None = None
        """What it could not be read or written for, until it can be again."""
        self._file = HistoryFile(storage, run, origin)
        self._disk = disk
        self._run = run
        self._now = now
        self._clock = clock
        self._patience_s = patience_s
        self._curves: HistoryCurves | None = None
        """None where the first shard is another's, and where what is in storage cannot be read."""
        self._is_kept = self._has_changed = self._is_replaying = False
        self._next_save = -inf
        self._lock = asyncio.Lock()
        """Held while it is read or written."""

    # What happens

    def take(self, event: Event) -> None:
        """Something has happened to the run."""
        if self._curves is not None:
            self._curves.take(event, self._now(), is_replayed=self._is_replaying)
            self._has_changed = True
            if event.kind == "checkpoint":
                # So that what a run goes back to is in its curves.
                self._next_save = -inf

    def live(self, workers: int) -> None:
        """So many workers hold leases."""
        if self._curves is not None:
            self._has_changed |= self._curves.live(workers, self._now())

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While the block lasts, events are told of again."""
        self._is_replaying = True
        try:
            yield
        finally:
            self._is_replaying = False

    # Who reads

    @property
    def curves(self) -> HistoryCurves:
        """Raises StorageUnavailable where it could not be read yet."""
        if self._curves is None:
            raise StorageUnavailable(self.failure or f"the history of {self._run!r} is not read yet")
        return self._curves

    # In storage

    async def begin(self) -> None:
        """The first shard is this process's: goes on with what is in storage."""
        self._is_kept = True
        if self._curves is not None:
            # No opening waits for what is being written.
            return
        async with self._lock:
            if self._curves is None:
                await self._read()

    def end(self) -> None:
        """The first shard is this process's no more."""
        self._is_kept = self._has_changed = False
        self._curves = self.failure = None

    def is_due(self) -> bool:
        """Whether it is time to save it."""
        return (
            self._is_kept
            and (self._has_changed or self._curves is None)
            and not self._lock.locked()
            and self._clock() >= self._next_save
        )

    async def save(self) -> None:
        """Writes it, if there is anything new. What it fails with is logged once."""
        async with self._lock:
            if self._is_kept and self._curves is None:
                await self._read()
            if self._curves is None or not self._has_changed:
                return
            self._next_save = self._clock() + _SAVED_EVERY_S
            self._has_changed = False
            try:
                await self._disk.run(self._file.write, self._curves.to_document())
            except StorageUnavailable as error:
                self._has_changed = True
                self._note(f"it is not written, and is tried again: {error}")
            else:
                self.failure = None

    async def forget(self) -> None:
        """Removes it from storage: the run is no more. Raises StorageUnavailable."""
        async with self._lock:
            await self._disk.run(self._file.remove)

    async def _read(self) -> None:
        self._next_save = self._clock() + _SAVED_EVERY_S
        try:
            async with asyncio.timeout(self._patience_s):
                found = await self._disk.run(self._file.read)
        except (StorageUnavailable, TimeoutError) as error:
            reason = str(error) or f"the storage has not answered for {self._patience_s:g} s"
            self._note(f"it is not read, and nothing is added to it until it is: {reason}")
            return
        except Damaged as error:
            logger.error("run %s: its history is damaged, and begins anew: %s", self._run, error)
            # So that it is said once.
            self._has_changed = True
            found = None
        self.failure = None
        if self._is_kept:
            self._curves = found or HistoryCurves()

    def _note(self, failure: str) -> None:
        if failure != self.failure:
            self.failure = failure
            logger.warning("run %s: its history: %s", self._run, failure)
