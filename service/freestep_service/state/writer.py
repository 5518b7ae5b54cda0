"""The writer of a shard: the one thread that changes it; for a small shard that is the event loop's.

Commits return from Redis in any order; the shard applies them in the order of the log. Whatever must see the state
between two entries (snapshots, checkpoints, restores) runs on the same thread. An update that fails ends the writer's
work: the state may be half changed, so nothing is applied to it or read from it until another has been loaded.

Where an update needs the distances between its pushes over all shards, its entry takes two turns. In the first the
shard measures its part of them, which changes nothing; then the entry waits in the log, as if it had not come, until
somebody brings the sum over all shards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import LogPosition, Lost
from freestep_service.state.compute import SLOWER, DeviceLocks, arithmetic_threads
from freestep_service.state.log import Entry, Log
from freestep_service.state.shard import Shard

__all__ = ["Writer"]

logger = logging.getLogger("freestep")

T = TypeVar("T")


class Writer:
    """Applies log entries to a shard, in order, on one thread.

    The memory of an entry is given back when it has been applied, or never can be. name: for the log. record: writes
    an entry to the shard's journal, and tells when it is on disk; before that it is not applied.
    """

    def __init__(
        self,
        shard: Shard,
        name: str,
        locks: DeviceLocks,
        record: Callable[[Entry, Callable[[Exception | None], None]], None] | None = None,
    ) -> None:
        self.shard = shard
        self.era = 0
        """How often Redis has lost data: what it answered in an earlier era it may have forgotten."""
        self.applied_step = 0
        self.failure: BaseException | None = None
        """What the last update failed with, until another state is loaded."""
        self.on_taken: Callable[[Entry], None] = lambda entry: None
        """Called on the event loop for each entry once its application is under way: what is then run on the writer's
        thread sees the state that the entry leaves."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called once when an update has failed."""
        self.on_measured: Callable[[Entry, Tensor, asyncio.Future[None]], None] = lambda entry, distances, applied: None
        """Called for an entry that waits, with this shard's part of its distances and its outcome."""
        self._name = name
        self._locks = locks
        self._record = record
        self._resumptions = 0
        self._log = Log(needs_distances=shard.needs_distances, is_recorded=record is not None)
        self._closed = False
        self._applied: dict[tuple[int, int], asyncio.Future[None]] = {}
        """The outcome of each entry that was submitted and is not yet applied."""
        self._under_way: set[asyncio.Future[Any]] = set()
        self._measured: tuple[Entry, asyncio.Future[Tensor]] | None = None
        """The entry whose distances are needed, until it is applied or lost, and this shard's part of them."""
        work = shard.manifest.numel * (1 if shard.is_elementwise else SLOWER)
        inline = locks.runs_inline(shard.device, work)
        self._thread = None if inline else arithmetic_threads(f"writer-{name}", 1)
        self._waiters: set[tuple[int, asyncio.Future[None]]] = set()

    # The log

    @property
    def epoch(self) -> int:
        """The epoch whose entries are taken."""
        return self._log.epoch

    @property
    def position(self) -> LogPosition:
        """How much of the log is known to exist."""
        return self._log.position

    @property
    def taken_seq(self) -> int:
        """The newest entry that the shard was given."""
        return self._log.taken_seq

    @property
    def is_waiting(self) -> bool:
        """Whether an entry waits for its distances over all shards."""
        return self._log.awaiting is not None

    @property
    def has_gap(self) -> bool:
        """Whether entries are held because one before them has not come."""
        return self._log.has_gap

    def has(self, epoch: int, seq: int) -> bool:
        """Whether an entry has come."""
        return self._log.has(epoch, seq)

    def note(self, epoch: int, seq: int) -> None:
        """Notes that an entry exists, which is still to come."""
        self._log.note(epoch, seq)

    def submit(self, entry: Entry) -> asyncio.Future[None]:
        """Takes an entry and its memory, or holds them until the entries before it have come.

        The future is done once the entry is applied; it fails with Lost where the run was opened again instead, and
        with ShardUnavailable where the update failed.
        """
        key = entry.epoch, entry.seq
        future = self._applied.get(key)
        if future is not None and self._log.has(*key):
            _give_back(entry)
            return future
        future = asyncio.get_running_loop().create_future()
        if self._closed or self.failure is not None or self._log.is_past(*key):
            _give_back(entry)
            _fail(future, Lost())
            return future
        self._applied[key] = future
        self._log.add(entry)
        self._take()
        return future

    def _take(self) -> None:
        if self._record is not None:
            for entry in self._log.unrecorded():
                self._record(entry, partial(self._recorded, entry, self._resumptions))
        for entry in self._log.take():
            work = self._begin(self._work_on, self.shard.apply, entry)
            self._under_way.add(work)
            work.add_done_callback(lambda done, entry=entry: self._finish(done, entry))  # type: ignore[misc]
            self.on_taken(entry)
        if self.shard.needs_distances and (awaiting := self._log.awaiting) is not None:
            self._measure(awaiting)

    def _recorded(self, entry: Entry, resumptions: int, error: Exception | None) -> None:
        """An entry is in the journal, or could not be written."""
        if resumptions != self._resumptions or self._closed:
            return
        if error is None:
            self._log.recorded(entry.seq)
            self._take()
        elif self.failure is None:
            self.failure = error
            self._fail(entry, error)

    def _work_on(self, function: Callable[[Entry], T], entry: Entry) -> T:
        """On the writer's thread."""
        if self.failure is not None:
            raise Lost
        try:
            return function(entry)
        except Exception as error:
            # Set here, before the thread comes to the next entry.
            self.failure = error
            raise

    def _finish(self, work: asyncio.Future[None], entry: Entry) -> None:
        self._under_way.discard(work)
        if self.shard.needs_distances:
            self._end_measuring(entry)
        _give_back(entry)
        future = self._applied.pop((entry.epoch, entry.seq))
        error = work.exception()
        if isinstance(error, Lost):
            _fail(future, error)
        elif error is not None:
            _fail(future, ShardUnavailable(f"the update failed and the run returns to its newest checkpoint: {error}"))
            self._fail(entry, error)
        else:
            if entry.epoch == self.epoch:
                self.applied_step = max(self.applied_step, self.shard.step)
                self._wake(lambda step: step <= self.applied_step)
            future.set_result(None)

    def _fail(self, entry: Entry, error: BaseException) -> None:
        """Takes nothing more: an update has failed."""
        logger.error("%s: the update of log entry %d failed", self._name, entry.seq, exc_info=error)
        self._log.pause()
        self._lose(self._log.drop_held())
        self._wake(lambda _: True)
        self.on_failure()

    def _measure(self, entry: Entry) -> None:
        """Measures this shard's part of the distances that an entry waits for, once."""
        if self._measured is None or self._measured[0] is not entry:
            work = self._begin(self._work_on, self.shard.square_distances, entry)
            self._measured = entry, work
            self._under_way.add(work)
            work.add_done_callback(lambda done: self._finish_measuring(done, entry))

    def _finish_measuring(self, work: asyncio.Future[Tensor], entry: Entry) -> None:
        self._under_way.discard(work)
        error = work.exception()
        if error is not None:
            if not isinstance(error, Lost):
                self._fail(entry, error)
        elif self._measured is not None and self._measured[1] is work:
            self.on_measured(entry, work.result(), self._applied[entry.epoch, entry.seq])

    def _end_measuring(self, entry: Entry) -> asyncio.Future[Tensor] | None:
        """Forgets the distances of an entry that needs them no more; returns their measurement if it is under way."""
        if self._measured is None or (self._measured[0].epoch, self._measured[0].seq) != (entry.epoch, entry.seq):
            return None
        (_, work), self._measured = self._measured, None
        return None if work.done() else work

    def add_distances(self, epoch: int, seq: int, distances: Tensor) -> None:
        """Gives the entry that waits for them its distances over all shards; any other has no need of them."""
        self._log.add_distances(epoch, seq, distances)
        self._take()

    def _lose(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if (measuring := self._end_measuring(entry)) is not None:
                # Its gradient is being read.
                measuring.add_done_callback(lambda _, entry=entry: _give_back(entry))  # type: ignore[misc]
            else:
                _give_back(entry)
            _fail(self._applied.pop((entry.epoch, entry.seq)), Lost())

    def pause(self, *, forget: bool = False) -> None:
        """Takes no entries until `resume`; those that come are held.

        forget: Redis has lost data. That ends an era, and the entries held already are Lost.
        """
        self._log.pause()
        if forget:
            self.era += 1
            self._lose(self._log.drop_held())

    def resume(self, epoch: int, seq: int, step: int, recorded_seq: int = 0) -> None:
        """Goes on after entry `seq` of an epoch; held entries of other epochs are Lost.

        recorded_seq: the newest entry that is in the journal already.
        """
        self.applied_step = step
        self._resumptions += 1
        self._lose(self._log.resume(epoch, seq, recorded_seq))
        self._take()
        self._wake(lambda _: True)

    # Work on the writer's thread

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs a function on the writer's thread, after the entries that were taken before.

        Raises ShardUnavailable once the writer is closed, or where an update has failed.
        """
        return await self.call(function, *arguments)

    def call(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """As `run`, but queued when this returns."""
        if self._closed:
            raise ShardUnavailable("the shard is being given up")
        return self._begin(self._on_sound_state, function, *arguments)

    def _on_sound_state(self, function: Callable[..., T], *arguments: object) -> T:
        if self.failure is not None:
            raise ShardUnavailable(f"an update failed and the run returns to its newest checkpoint: {self.failure}")
        return function(*arguments)

    async def load(self, function: Callable[..., None], *arguments: object) -> None:
        """Runs a function that replaces the whole state, also after an update has failed."""

        def replace() -> None:
            function(*arguments)
            self.failure = None

        await self._begin(replace)

    def _begin(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        if self._thread is not None:
            return loop.run_in_executor(self._thread, self._locks.exclusive(self.shard.device, function), *arguments)
        done: asyncio.Future[T] = loop.create_future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    # Steps

    async def reach(self, step: int, timeout: float) -> bool:
        """Waits until the shard has reached a step, for at most `timeout` seconds; whether it has."""
        loop = asyncio.get_running_loop()
        epoch, deadline = self.epoch, loop.time() + timeout
        while (
            not self._closed
            and self.failure is None
            and self.applied_step < step
            and self.epoch == epoch
            and (left := deadline - loop.time()) > 0
        ):
            waiter = (step, loop.create_future())
            self._waiters.add(waiter)
            try:
                await asyncio.wait([waiter[1]], timeout=left)
            finally:
                self._waiters.discard(waiter)
        return self.epoch == epoch and self.applied_step >= step

    def _wake(self, is_due: Callable[[int], bool]) -> None:
        for step, woken in self._waiters:
            if is_due(step) and not woken.done():
                woken.set_result(None)

    async def close(self) -> None:
        """Applies what was taken, loses what is held, and ends the thread."""
        if self._closed:
            return
        self._closed = True
        self._log.pause()
        self._lose(self._log.drop_held())
        self._wake(lambda _: True)
        if self._under_way:
            await asyncio.wait(set(self._under_way))
        if self._thread is not None:
            self._thread.shutdown(wait=False)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    future.set_exception(error)
    # Its waiter may have left.
    future.exception()


def _give_back(entry: Entry) -> None:
    if entry.hold is not None:
        entry.hold.release()
