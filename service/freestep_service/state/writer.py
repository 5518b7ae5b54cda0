"""The one thread that changes a shard, and the order in which it does; for a small shard that is the event loop's.

Commits come back from Redis in any order; the shard takes them in the order of the log. Whatever must see the
shard between two entries (snapshots, checkpoints, restores) runs on the same thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import LogPosition, Lost
from freestep_service.state.compute import DeviceLocks, arithmetic_threads
from freestep_service.state.shard import Entry, Shard

__all__ = ["Writer"]

T = TypeVar("T")


class Writer:
    """Applies log entries to a shard, in order, on one thread."""

    def __init__(
        self, shard: Shard, name: str, taken: Callable[[Entry], None] | None = None, locks: DeviceLocks | None = None
    ) -> None:
        self.shard = shard
        self._locks = locks or DeviceLocks()
        self._taken = taken
        """Called, on the event loop, for each entry once its application is under way: what is then run on the
        writer's thread sees the state that the entry leaves."""
        self.epoch = 0
        """The epoch whose entries are taken."""
        self.known_seq = 0
        """The newest entry heard of in this epoch."""
        self.era = 0
        """How often Redis has lost data: what it said in an earlier era it may have forgotten."""
        self.applied_step = 0
        self._next_seq = 1
        self._paused = True
        self._closed = False
        self._held: dict[tuple[int, int], tuple[Entry, asyncio.Future[None]]] = {}
        at_once = self._locks.runs_inline(shard.device, shard.manifest.numel)
        self._thread = None if at_once else arithmetic_threads(f"writer-{name}", 1)
        self._waiters: set[tuple[int, asyncio.Future[None]]] = set()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs a function on the writer's thread, after the entries that were taken before.

        Raises ShardUnavailable once the writer is closed.
        """
        return await self.call(function, *arguments)

    def call(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """As `run`, but in line already when this returns."""
        if self._closed:
            raise ShardUnavailable("the shard is being given up")
        return self._begin(function, *arguments)

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

    async def apply(self, entry: Entry) -> None:
        """Returns once the entry is applied; raises Lost when the run was opened again instead."""
        await asyncio.shield(self.submit(entry))

    def submit(self, entry: Entry) -> asyncio.Future[None]:
        """Takes an entry, or holds it until those before it have come; the future is done once it is applied."""
        key = (entry.epoch, entry.seq)
        if key not in self._held:
            if not self._paused and (entry.epoch != self.epoch or entry.seq < self._next_seq):
                raise Lost
            self._held[key] = (entry, asyncio.get_running_loop().create_future())
        future = self._held[key][1]
        self._take()
        return future

    @property
    def known(self) -> LogPosition:
        return LogPosition(self.epoch, self.known_seq)

    @property
    def taken_seq(self) -> int:
        """The newest entry that the shard was given."""
        return self._next_seq - 1

    def has(self, epoch: int, seq: int) -> bool:
        """Whether an entry has come."""
        return (epoch == self.epoch and seq < self._next_seq) or (epoch, seq) in self._held

    def heard_of(self, epoch: int, seq: int) -> None:
        """Takes note that an entry exists, which is still to come."""
        if epoch == self.epoch:
            self.known_seq = max(self.known_seq, seq)

    @property
    def has_gap(self) -> bool:
        """Whether entries are held because one before them has not come."""
        return bool(self._held)

    def _take(self) -> None:
        while not self._paused and (held := self._held.pop((self.epoch, self._next_seq), None)):
            entry, future = held
            self.known_seq = max(self.known_seq, entry.seq)
            self._next_seq += 1
            work = self._begin(self.shard.apply, entry)
            work.add_done_callback(lambda done, future=future: self._finish(done, future))  # type: ignore[misc]
            if self._taken is not None:
                self._taken(entry)
        newest = max((seq for epoch, seq in self._held if epoch == self.epoch), default=0)
        self.known_seq = max(self.known_seq, newest)

    def _finish(self, work: asyncio.Future[None], future: asyncio.Future[None]) -> None:
        if error := work.exception():
            future.set_exception(error)
            return
        if self.shard.epoch == self.epoch:
            self.applied_step = max(self.applied_step, self.shard.step)
            self._wake(lambda step: step <= self.applied_step)
        future.set_result(None)

    def pause(self, *, forget: bool = False) -> None:
        """Takes no entries until `resume`. Those that come are held; those held already may be forgotten.

        They are where Redis has lost data, with which an era ends: its entries that are still to come are not to be
        submitted.
        """
        self._paused = True
        if forget:
            self.era += 1
            self._lose(list(self._held))

    def resume(self, epoch: int, seq: int, step: int) -> None:
        """Goes on after entry `seq` of an epoch; held entries of other epochs are Lost."""
        self._paused = False
        self.epoch, self.known_seq, self._next_seq = epoch, seq, seq + 1
        self.applied_step = step
        self._lose([key for key in self._held if key[0] != epoch or key[1] <= seq])
        self._take()
        self._wake(lambda _: True)

    def _lose(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            _, future = self._held.pop(key)
            future.set_exception(Lost())
            future.exception()

    async def reach(self, step: int, timeout: float) -> bool:
        """Waits until the shard has reached a step, for at most `timeout` seconds; whether it has."""
        loop = asyncio.get_running_loop()
        epoch, deadline = self.epoch, loop.time() + timeout
        while (
            not self._closed
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

    def close(self) -> None:
        """Stops the thread once it has done what it was given, and lets go those who wait for a step."""
        self._closed = True
        self._wake(lambda _: True)
        if self._thread is not None:
            self._thread.shutdown()
