"""Points of a run of several shards, as of one place in the log: every shard sends its part of the same cut.

Which places are cut at is decided in Redis, where it is known how much memory all shards have for it, and written into
the log (lua/_prelude.lua): a ticket, which the requests for all parts of one pull share, gets the first cut for which
there is room, and those that wait for room get one together. A shard takes its part when it comes to that place, and
keeps it until it is asked for, or for so long that nobody will.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

from freestep.api.models import Point
from freestep.errors import CoordinatorUnavailable, Overloaded, ProblemError, ShardUnavailable
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.records import Behind, Fenced, Owner
from freestep_service.state.bodies import body, room
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.shard import Entry
from freestep_service.state.snapshots import Reading, Snapshot, take
from freestep_service.state.views import PointView
from freestep_service.state.writer import Writer

__all__ = ["MOST_CUTS", "ConsistentReads"]

MOST_CUTS = 4
"""ConsistentReads that may be held at once, as lua/_prelude.lua grants them."""
_KEPT_S = 30.0
_UNSAID_S = 0.2
"""How long a push is waited for to tell Redis with it that a part was sent."""


@dataclass
class _Part:
    """A shard's part of a cut: what it is of, whose tickets it is for, and how many are reading it."""

    wanted: str
    seq: int
    taken: asyncio.Future[PointView]
    spare: Vector
    tickets: set[str]
    readers: int = 0
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class ConsistentReads:
    """The cuts of one shard."""

    def __init__(
        self, run: str, coordinator: Coordinator, writer: Writer, owner: Callable[[], Owner], queue_s: float
    ) -> None:
        self._run = run
        self._coordinator = coordinator
        self._writer = writer
        self._owner = owner
        self._queue_s = queue_s
        manifest = writer.shard.manifest
        self._pool = VectorPool(manifest.numel, MOST_CUTS, room(manifest), writer.shard.device)
        self._parts: dict[str, _Part] = {}
        self._waiting: dict[str, asyncio.Future[_Part]] = {}
        self._sent: list[str] = []
        self._reminder: asyncio.TimerHandle | None = None
        self._telling: set[asyncio.Task[None]] = set()

    def take(self, entry: Entry) -> None:
        """Takes the parts that an entry asks for: the next thing that the writer does."""
        for wanted in sorted(set(entry.cuts.values())):
            point, dtype, *only = wanted.split()
            if only and only != [str(self._owner().shard)]:
                continue
            tickets = {ticket for ticket, each in entry.cuts.items() if each == wanted}
            vector = self._pool.try_acquire()
            if vector is None:
                # Somebody is slow. Who wanted this is told to ask again.
                for ticket in tickets:
                    self._fail(ticket, Overloaded())
                continue
            part = _Part(wanted, entry.seq, take(self._writer, cast(Point, point), dtype, vector), vector, tickets)
            part.timer = asyncio.get_running_loop().call_later(_KEPT_S, self._expire, part)
            self._parts.update(dict.fromkeys(tickets, part))
            for ticket in tickets & self._waiting.keys():
                self._waiting.pop(ticket).set_result(part)

    @asynccontextmanager
    async def read(self, reading: Reading) -> AsyncIterator[Snapshot]:
        """This shard's part of a ticket's cut, kept until the block ends.

        Raises Overloaded when there is no memory for it in time, ShardUnavailable, CoordinatorUnavailable.
        """
        ticket, part = await self._part(reading)
        part.readers += 1
        try:
            view = await asyncio.shield(part.taken)
            manifest = self._writer.shard.manifest
            header, data = body(view.vector, manifest, reading.dtype, self._run, view.epoch, view.step, reading.point)
            yield Snapshot(view.epoch, view.step, header, data, view, seq=part.seq)
        finally:
            part.readers -= 1
            if ticket in part.tickets:
                part.tickets.discard(ticket)
                self._parts.pop(ticket, None)
                self._note(ticket)
            self._let_go(part)

    async def _part(self, reading: Reading) -> tuple[str, _Part]:
        """The part that is wanted, and the ticket that it goes by."""
        loop = asyncio.get_running_loop()
        ticket, readers, wanted = reading.ticket, reading.readers, f"{reading.point} {reading.dtype}"
        # What no other shard is asked for, none other takes.
        alone = f"{wanted} {self._owner().shard}"
        if not ticket:
            ticket, readers, wanted = secrets.token_hex(16), 1, alone
        try:
            part = self._parts.get(ticket)
            if reading.asked and part is None:
                part = await self._come(ticket, self._queue_s if reading.patience is None else reading.patience)
            deadline = loop.time() + self._queue_s
            while part is None or part.wanted != wanted:
                # In line before Redis is asked: the cut may come before its answer.
                self._waiting.setdefault(ticket, loop.create_future())
                seq = await self._ask(ticket, wanted, readers)
                part, left = self._parts.get(ticket), deadline - loop.time()
                if part.wanted != wanted if part else 0 < seq <= self._writer.taken_seq:
                    # The ticket is of something else, or was read already, or nobody came for it: a new one, which is
                    # not the same cut as the others'.
                    self._waiting.pop(ticket, None)
                    ticket, readers, wanted, part = secrets.token_hex(16), 1, alone, None
                elif part is None and left <= 0:
                    raise Overloaded
                elif part is None:
                    part = await self._come(ticket, min(left, 1.0))
            return ticket, part
        except BaseException:
            self._waiting.pop(ticket, None)
            raise

    async def _come(self, ticket: str, seconds: float) -> _Part | None:
        """Waits for a ticket's part."""
        if ticket in self._parts:
            return self._parts[ticket]
        future = self._waiting.setdefault(ticket, asyncio.get_running_loop().create_future())
        done, _ = await asyncio.wait([future], timeout=seconds)
        return future.result() if done else None

    async def _ask(self, ticket: str, wanted: str, readers: int) -> int:
        try:
            return await self._coordinator.log.request_read(self._owner(), ticket, wanted, readers)
        except (Behind, Fenced):
            raise ShardUnavailable from None

    def _fail(self, ticket: str, problem: ProblemError) -> None:
        if (future := self._waiting.pop(ticket, None)) is not None and not future.done():
            future.set_exception(problem)
            # Its waiter may have left.
            future.exception()

    def _expire(self, part: _Part) -> None:
        for ticket in part.tickets:
            self._parts.pop(ticket, None)
        part.tickets = set()
        self._let_go(part)

    def _let_go(self, part: _Part) -> None:
        if part.readers or part.tickets or part.timer is None:
            return
        part.timer.cancel()
        part.timer = None
        part.taken.add_done_callback(lambda taken: self._release(taken, part.spare))

    def _release(self, taken: asyncio.Future[PointView], spare: Vector) -> None:
        """Takes back the vector of a part that was let go, when nobody writes to it any more."""
        if taken.cancelled() or taken.exception() is not None:
            self._pool.release(spare)
            return
        view = taken.result()
        if view.copying is None:
            self._pool.release(view.end())
        else:
            view.copying.done.add_done_callback(lambda _: self._pool.release(view.end()))

    def _note(self, ticket: str) -> None:
        """Has Redis told that a part was sent: with the next push, or soon, or now if others may wait for room."""
        self._sent.append(ticket)
        held = len({part.seq for part in self._parts.values()})
        if held + len(self._sent) >= MOST_CUTS:
            self._tell()
        elif self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(_UNSAID_S, self._tell)

    def take_sent(self) -> list[str]:
        """The tickets whose parts were sent, for whoever tells Redis; what is then lost is known when the cuts' time is
        over."""
        sent, self._sent = self._sent, []
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None
        return sent

    def _tell(self) -> None:
        task = asyncio.create_task(self._say(self.take_sent()))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _say(self, sent: list[str]) -> None:
        with suppress(CoordinatorUnavailable):
            await self._coordinator.log.reads_sent(sent)

    async def close(self) -> None:
        """Forgets all cuts; who waits for one is told that the shard is gone."""
        for part in self._parts.values():
            if part.timer is not None:
                part.timer.cancel()
        self._parts.clear()
        for ticket in list(self._waiting):
            self._fail(ticket, ShardUnavailable())
        if self._sent:
            self._tell()
        await asyncio.gather(*self._telling)
