"""Points of a run as of one place in the log: every shard sends its part of the same consistent read.

A run of one shard reads at the newest step. Of several, the places are decided in Redis, where it is known how much
memory all shards have for it, and written into the log (lua/_prelude.lua): a ticket, which the requests for all parts
of one read share, gets the first place for which there is room. A shard takes its part when it comes to that place, and
keeps it until it is fetched, or for so long that nobody will.

The law of this file: no read holds up a push. What a slow or absent reader holds is counted apart and reported to Redis
as sent, so that its place goes to another; and a push whose answer finds no memory is answered with its receipt alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from freestep.api.models import Point
from freestep.errors import Overloaded, ProblemError, ShardUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.runs.context import RunContext
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.log import Entry
from freestep_service.state.snapshots import PointBody, Snapshot

__all__ = ["STATE", "ConsistentReads", "Reading"]

STATE = "state"
"""What a ticket asks for in place of a point where it wants the whole state (`state_exports`)."""

_KEPT_S = 30.0
_REPORT_S = 0.2
"""Seconds for which sent-acknowledgements are held back so that the next admit can carry them."""
_ANSWER_S = 1.0
"""Seconds for which a push's answer waits for its place, which fast readers leave within."""
_SILENCE_S = 1.0
"""Seconds for which a message is listened for before Redis is asked for what it would say."""
_PLACES = 4
"""Places that may be read at once, as lua/_prelude.lua grants them to pushes."""


@dataclass(frozen=True)
class Reading:
    """What is to be read: a point and its dtype.

    Of several shards, at the place that `ticket` gets, which `readers` shards are asked for.
    answers_push: whether it answers a push, which does not wait for readers. is_asked: whether that push's commit has
    asked Redis for the place. patience: seconds for which the push's group is waited for. checkpoint: what it is read
    of in place of the run's newest step (`checkpoint_reads`).
    """

    point: Point
    dtype: str
    ticket: str = ""
    readers: int = 1
    answers_push: bool = False
    is_asked: bool = False
    patience: float = 0.0
    checkpoint: CheckpointId | None = None


class ConsistentReads:
    """The reads of one shard."""

    def __init__(self, context: RunContext, recovery: Recovery, core: ShardCore) -> None:
        self._coordinator = context.coordinator.log
        self._background = context.background
        self._settings = context.settings
        self._recovery = recovery
        self._core = core
        self._snapshots = core.snapshots
        self._parts: dict[str, Snapshot] = {}
        """By ticket."""
        self._waiting: dict[str, asyncio.Future[Snapshot]] = {}
        self._sent: list[str] = []
        """Tickets whose parts were sent, and not yet reported to Redis."""
        self._reported: set[str] = set()
        """Tickets that were reported to Redis while their parts are still here, for slow readers."""
        self._reminder: asyncio.TimerHandle | None = None
        self._closed = False
        core.snapshots.pool.pressed = lambda: bool(self._waiting)

    @asynccontextmanager
    async def read(self, reading: Reading) -> AsyncIterator[PointBody]:
        """This shard's part of a point, which does not change until the block ends.

        Raises Overloaded when there is no memory for it in time, ShardUnavailable and CoordinatorUnavailable.
        """
        wait = self._settings.queue_seconds
        if not self._core.is_sharded:
            snapshot = await self._snapshots.newest(
                reading.point, reading.dtype, wait, waits_for_slow=not reading.answers_push
            )
            ticket = ""
        else:
            ticket, snapshot = await self._part(reading, wait)
            snapshot.needed += 1
        try:
            async with self._snapshots.reading(snapshot, self._settings.slow_bytes_per_second) as body:
                yield body
        finally:
            if ticket in snapshot.tickets:
                self._fetched(ticket, snapshot)

    # Parts of several shards

    def take(self, entry: Entry) -> None:
        """Takes the parts that an entry asks for: the next work of the writer."""
        for wanted in sorted(set(entry.reads.values())):
            point, dtype, *only = wanted.split()
            if point == STATE:
                continue
            if only and only != [str(self._core.index)]:
                continue
            tickets = {ticket for ticket, each in entry.reads.items() if each == wanted}
            try:
                vector = self._snapshots.pool.try_acquire()
                if vector is None:
                    raise Overloaded
                snapshot = self._snapshots.take(cast(Point, point), dtype, vector, entry.seq)
            except ProblemError as problem:
                # Its readers are to ask again; a push is answered with its receipt.
                for ticket in tickets:
                    self._fail(ticket, problem)
                    self._report(ticket)
                continue
            snapshot.wanted = wanted
            snapshot.tickets = set(tickets)
            snapshot.needed = len(tickets)
            snapshot.on_apart = lambda snapshot=snapshot: self._report_slow(snapshot)  # type: ignore[misc]
            asyncio.get_running_loop().call_later(_KEPT_S, self._expire, snapshot)
            for ticket in tickets:
                self._parts[ticket] = snapshot
                if (waiting := self._waiting.pop(ticket, None)) is not None and not waiting.done():
                    waiting.set_result(snapshot)

    async def _part(self, reading: Reading, wait: float) -> tuple[str, Snapshot]:
        """The part that is wanted, and the ticket that it goes by."""
        loop = asyncio.get_running_loop()
        ticket, readers, wanted = reading.ticket, reading.readers, f"{reading.point} {reading.dtype}"
        # A read of this shard only is taken by no other.
        alone = f"{wanted} {self._core.index}"
        if not ticket:
            ticket, readers, wanted = secrets.token_hex(16), 1, alone
        try:
            part = self._parts.get(ticket)
            if reading.is_asked and part is None:
                part = await self._come(ticket, reading.patience or _ANSWER_S)
                if part is None and not reading.patience:
                    self._report(ticket)
                    raise Overloaded("no memory for the answer was free in time")
            deadline = loop.time() + wait
            while part is None or part.wanted != wanted:
                # Waiting before Redis is asked: the place may come before its answer.
                self._waiting.setdefault(ticket, loop.create_future())
                seq = await self._recovery.call(
                    lambda ticket=ticket, wanted=wanted, readers=readers: self._coordinator.request_read(  # type: ignore[misc]
                        self._core.owner(), ticket, wanted, readers
                    )
                )
                part, left = self._parts.get(ticket), deadline - loop.time()
                if part.wanted != wanted if part else 0 < seq <= self._core.writer.taken_seq:
                    # The ticket is of something else, or was read already, or nobody came for it: a new one, which is
                    # not the same place as the others'.
                    self._waiting.pop(ticket, None)
                    ticket, readers, wanted, part = secrets.token_hex(16), 1, alone, None
                elif part is None and left <= 0:
                    raise Overloaded("no memory for the answer was free")
                elif part is None:
                    part = await self._come(ticket, min(left, _SILENCE_S))
            return ticket, part
        finally:
            self._waiting.pop(ticket, None)

    async def _come(self, ticket: str, seconds: float) -> Snapshot | None:
        """Waits for a ticket's part."""
        if ticket in self._parts:
            return self._parts[ticket]
        if self._closed:
            raise ShardUnavailable
        future = self._waiting.setdefault(ticket, asyncio.get_running_loop().create_future())
        done, _ = await asyncio.wait([future], timeout=seconds)
        return future.result() if done else None

    def _fail(self, ticket: str, problem: ProblemError) -> None:
        if (future := self._waiting.pop(ticket, None)) is not None and not future.done():
            future.set_exception(problem)
            # Its waiter may have left.
            future.exception()

    def _fetched(self, ticket: str, snapshot: Snapshot) -> None:
        """A ticket's part was sent."""
        snapshot.tickets.discard(ticket)
        self._parts.pop(ticket, None)
        self._report(ticket)
        self._snapshots.let_go(snapshot)

    def _expire(self, snapshot: Snapshot) -> None:
        for ticket in list(snapshot.tickets):
            snapshot.tickets.discard(ticket)
            self._parts.pop(ticket, None)
            self._reported.discard(ticket)
            self._snapshots.let_go(snapshot)

    # Reports to Redis

    def _report_slow(self, snapshot: Snapshot) -> None:
        """A part's memory is counted apart: for Redis it is as if it were sent."""
        for ticket in snapshot.tickets:
            self._report(ticket)
            self._reported.add(ticket)
        self._send_reports()

    def _report(self, ticket: str) -> None:
        """Reports to Redis that a part was sent: with the next push, or soon, or now if others may wait for room."""
        if ticket in self._reported:
            self._reported.discard(ticket)
            return
        self._sent.append(ticket)
        held = len({part.seq for part in self._parts.values()})
        if held + len(self._sent) >= _PLACES:
            self._send_reports()
        elif self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(_REPORT_S, self._send_reports)

    def take_sent(self) -> list[str]:
        """The tickets whose parts were sent, for the caller to report to Redis."""
        sent, self._sent = self._sent, []
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None
        return sent

    def _send_reports(self) -> None:
        if sent := self.take_sent():
            self._background.spawn(self._coordinator.reads_sent(sent), "reads that were sent were not reported")

    def close(self) -> None:
        """Forgets all parts; those who wait for one get ShardUnavailable."""
        self._closed = True
        for ticket in list(self._waiting):
            self._fail(ticket, ShardUnavailable())
        for snapshot in set(self._parts.values()):
            self._expire(snapshot)
        self._send_reports()
