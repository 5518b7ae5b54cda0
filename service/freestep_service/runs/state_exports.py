"""Copies of one shard's whole state for those who export the run; of several shards, all of one place in the log.

A ticket gets its place as a pull's does (`consistent_reads`), but never one of those of pushes and pulls: states have
one of their own, so nobody else waits for who asks one shard and not the others. And the memory of the copy is no
vector of the shard's pools: it is counted in the process's budget, and given back when the copy has been sent.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from freestep.errors import Overloaded, ShardUnavailable
from freestep_service.runs.consistent_reads import STATE
from freestep_service.runs.context import RunContext
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.log import Entry
from freestep_service.state.shard import StateCopy

__all__ = ["StateExports"]

_KEPT_S = 30.0
_SILENCE_S, _PAUSE_S = 1.0, 0.2
"""Seconds for which a message is listened for before Redis is asked for what it would say, and between two requests for
the place while others have it."""


@dataclass(eq=False)
class _Ticket:
    """A copy that somebody wants. taken: whether it is being made. readers: how many of those who want it are here.

    size: the bytes that are counted for it. How many the next one takes may change meanwhile, with the run's policy.
    """

    copy: asyncio.Future[StateCopy] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: bool = False
    readers: int = 0
    size: int = 0


class StateExports:
    """The copies of one shard's state."""

    def __init__(self, context: RunContext, recovery: Recovery, core: ShardCore) -> None:
        self._log = context.coordinator.log
        self._background = context.background
        self._budget = context.resources.memory
        self._patience_s = context.settings.queue_seconds
        self._recovery = recovery
        self._core = core
        self._tickets: dict[str, _Ticket] = {}

    @asynccontextmanager
    async def read(self, word: str, readers: int) -> AsyncIterator[StateCopy]:
        """A copy of the state; its memory is given back when the block ends.

        word: what the requests to all `readers` shards have in common; empty for a copy of this shard alone.
        Raises Overloaded where there is no memory for it, ShardUnavailable and CoordinatorUnavailable.
        """
        wanted = f"{STATE} F32" if word else f"{STATE} F32 {self._core.index}"
        name, ticket = word or secrets.token_hex(16), _Ticket()
        if self._core.is_sharded:
            ticket = self._tickets.setdefault(name, ticket)
        else:
            self._take(ticket)
        ticket.readers += 1
        try:
            if self._core.is_sharded:
                await self._come(name, ticket, wanted, readers if word else 1)
            yield await asyncio.shield(ticket.copy)
        finally:
            ticket.readers -= 1
            self._let_go(name, ticket)

    async def _come(self, name: str, ticket: _Ticket, wanted: str, readers: int) -> None:
        """Returns when a ticket has its copy, or never will have."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        while not ticket.copy.done():
            seq = 0
            if not ticket.taken:
                seq = await self._recovery.call(
                    lambda: self._log.request_read(self._core.owner(), name, wanted, readers, "state")
                )
            if not ticket.taken and 0 < seq <= self._core.writer.taken_seq:
                raise ShardUnavailable("the copy was not asked for in time")
            if not ticket.taken and loop.time() >= deadline:
                raise Overloaded("others export the run")
            await asyncio.wait([ticket.copy], timeout=_SILENCE_S if seq or ticket.taken else _PAUSE_S)

    def take(self, entry: Entry) -> None:
        """Takes the copies that an entry asks for: the next work of the writer."""
        for name, wanted in entry.reads.items():
            if wanted in (f"{STATE} F32", f"{STATE} F32 {self._core.index}"):
                ticket = self._tickets.setdefault(name, _Ticket())
                if not ticket.taken:
                    self._take(ticket)
                    asyncio.get_running_loop().call_later(_KEPT_S, self._expire, name, ticket)

    def _take(self, ticket: _Ticket) -> None:
        ticket.taken = True
        ticket.size = size = self._core.shard.state_bytes(self._core.vectors.gathered)
        if not self._budget.try_reserve(size):
            free = self._budget.free
            _fail(ticket, Overloaded(f"a copy of the state takes {size} bytes of memory, and {free} are free"))
            return
        try:
            copying = self._core.writer.call(self._core.shard.copy_state)
        except ShardUnavailable as error:
            self._budget.release(size)
            _fail(ticket, error)
            return
        copying.add_done_callback(lambda copied: self._taken(ticket, copied))

    def _taken(self, ticket: _Ticket, copied: asyncio.Future[StateCopy]) -> None:
        if (error := copied.exception()) is not None:
            _fail(ticket, error)
        if ticket.copy.done():
            # It failed, or nobody wants it any more.
            self._budget.release(ticket.size)
        else:
            ticket.copy.set_result(copied.result())

    def _let_go(self, name: str, ticket: _Ticket) -> None:
        """Gives back the memory of a ticket that nobody reads, and its place if it has one."""
        if ticket.readers:
            return
        if self._tickets.get(name) is ticket:
            del self._tickets[name]
            if ticket.taken:
                self._background.spawn(self._log.reads_sent([name]), "a copy that was sent was not reported")
        if ticket.copy.done() and ticket.copy.exception() is None:
            self._budget.release(ticket.size)
        else:
            _fail(ticket, ShardUnavailable("the copy is not wanted any more"))

    def _expire(self, name: str, ticket: _Ticket) -> None:
        if self._tickets.get(name) is ticket:
            self._let_go(name, ticket)

    def close(self) -> None:
        """Forgets all copies that nobody reads yet; those who wait for one get ShardUnavailable."""
        for name, ticket in list(self._tickets.items()):
            if ticket.readers:
                _fail(ticket, ShardUnavailable())
            self._let_go(name, ticket)


def _fail(ticket: _Ticket, error: BaseException) -> None:
    if not ticket.copy.done():
        ticket.copy.set_exception(error)
        # Who wanted it may have left.
        ticket.copy.exception()
