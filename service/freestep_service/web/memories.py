"""Memory that clients on this machine share with the service: offered over HTTP, handed over a Unix socket.

HTTP decides who gets memory, as it decides who pushes: under a lease, with its token. What it answers with, a ticket,
is worth nothing but at the Unix socket, and there only to a process of the service's own user: a client that can show
it is on this machine. A memory lasts as long as the connection that it was handed over by and its lease: whichever
process dies, the kernel closes the connection, and nothing has a name that could be left behind.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from freestep.api.memory import MemoryGrant, MemoryOffer, MemoryRequest
from freestep.errors import EpochChanged, LeaseExpired, MemoryNotShared, ProblemError, RunNotFound
from freestep.wire.header import encoded_limit
from freestep.wire.unix_peers import is_of_this_user
from freestep_service.domain.records import Claim
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from freestep_service.state.bodies import room
from freestep_service.state.compute import uninterrupted
from freestep_service.state.memory_budget import available_memory
from freestep_service.state.shared_memory import IS_POSSIBLE, Layout, SharedMemory

__all__ = ["Memories"]

logger = logging.getLogger("freestep")

_TICKET_S = 5.0
"""Seconds for which a ticket is good, and within which who has connected has to show one."""
_LOOK_S = 5.0
"""Seconds between two looks at whether the leases of memories have ended."""
_PAUSE_S = 1.0
"""Seconds without accepting after the system had no descriptor for a connection."""
_MOST_WAITING = 64
"""Connections that have not shown a ticket."""
_MOST = 64
"""Memories at once: each takes two descriptors, of those that connections leave to others."""
_THREADS = 2
_TICKET_BYTES = 16


@dataclass(eq=False)
class _Place:
    """A memory from its offer on: of whom, of what size, and what serves it."""

    run: Run
    shard: int
    lease: str
    token: int
    layout: Layout
    memory: SharedMemory | None = None
    serving: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None
    name: str = field(default_factory=lambda: secrets.token_hex(_TICKET_BYTES))

    @property
    def holder(self) -> tuple[str, int, str]:
        """Whose it is; each has one."""
        return self.run.name, self.shard, self.lease


class Memories:
    """The memories of one process; a context manager. Where `settings.shared_memory` is off, it offers none."""

    def __init__(self, resources: Resources) -> None:
        self._budget = resources.memory
        self._locks = resources.locks
        self._threads = ThreadPoolExecutor(_THREADS, "freestep-pages")
        """Make pages and give them back, and hold up no others' work."""
        self._shared = resources.metrics.shared
        self._offers = resources.settings.shared_memory and IS_POSSIBLE
        self._name = f"freestep-{secrets.token_hex(_TICKET_BYTES)}"
        self._tickets: dict[str, _Place] = {}
        self._places: dict[tuple[str, int, str], _Place] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._socket: socket.socket | None = None

    async def __aenter__(self) -> Self:
        if self._offers:
            try:
                self._socket = _listening(self._name)
            except OSError as error:
                # Of no descriptor, say, or in a sandbox.
                logger.warning("no memory is shared with workers here: there is no Unix socket: %s", error)
                self._offers = False
            else:
                self._spawn(self._accept(self._socket))
                self._spawn(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for place in list(self._places.values()):
            self._end(place)
        if self._socket is not None:
            self._socket.close()
        self._threads.shutdown(wait=False)

    @property
    def socket_name(self) -> str | None:
        """The name of the abstract Unix socket; None where no memory is offered."""
        return self._name if self._offers else None

    # What requests ask of it

    def offer(self, run: Run, lease: str, wish: MemoryRequest) -> MemoryOffer:
        """Memory for a lease that is good, in place of what it has for this shard. Raises MemoryNotShared.

        It is counted when the ticket is shown, to the bytes and to the memories that there may be: who is not on this
        machine keeps none from others.
        """
        if not self._offers:
            raise MemoryNotShared("the service shares no memory")
        if not run.owns(wish.shard):
            raise MemoryNotShared("the shard is another process's: ask that one")
        manifest = run.shard(wish.shard).core.manifest
        # No body is longer.
        body, answer = min(wish.body_bytes, encoded_limit(manifest)), min(wish.answer_bytes, room(manifest))
        place = _Place(run, wish.shard, lease, wish.token, Layout.of(manifest, body, answer))
        if (earlier := self._places.get(place.holder)) is not None:
            self._end(earlier)
        if self._shown >= _MOST:
            raise MemoryNotShared(f"the service shares {_MOST} memories already, which is the most")
        # As much again is for runs and states, which cannot do without.
        if 2 * place.layout.size > self._budget.free:
            raise MemoryNotShared(f"{place.layout.size} bytes are not to spare of what memory_bytes allows")
        ticket = secrets.token_hex(_TICKET_BYTES)
        self._tickets[ticket] = self._places[place.holder] = place
        place.expiry = asyncio.get_running_loop().call_later(_TICKET_S, self._end, place)
        return MemoryOffer(socket=self._name, ticket=ticket)

    @property
    def _shown(self) -> int:
        """How many places have had their tickets shown: they have descriptors, or will."""
        return sum(place.serving is not None for place in self._places.values())

    def find(self, name: str, run: Run, shard: int | None, lease: str | None = None) -> SharedMemory:
        """A memory for a shard's bodies, by its name; for pushes, of their lease. Raises MemoryNotShared."""
        for place in self._places.values():
            if place.memory is not None and secrets.compare_digest(place.name, name):
                if place.run is run and place.shard == shard and lease in (None, place.lease) and run.owns(shard):
                    return place.memory
                break
        raise MemoryNotShared("the service has no such memory for these bodies")

    def end_lease(self, run: Run, lease: str) -> None:
        """Gives up the memories of a lease that has ended."""
        for place in list(self._places.values()):
            if place.run is run and place.lease == lease:
                self._end(place)

    def give_back(self, size: int) -> None:
        """Gives up memories of at least `size` bytes, the oldest first; their clients use connections."""
        for place in [place for place in self._places.values() if place.serving is not None]:
            if size <= 0:
                break
            size -= place.layout.size
            self._end(place)

    def _end(self, place: _Place) -> None:
        if self._places.get(place.holder) is not place:
            return
        del self._places[place.holder]
        self._tickets = {ticket: each for ticket, each in self._tickets.items() if each is not place}
        if place.expiry is not None:
            place.expiry.cancel()
        if place.serving is not None:
            place.serving.cancel()

    # The Unix socket

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("memory is not shared any more as it was", exc_info=error)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                logger.warning("no connection for shared memory can be accepted: %s", error.strerror)
                await asyncio.sleep(_PAUSE_S)
                continue
            accepted.setblocking(False)
            if self._waiting >= _MOST_WAITING or not is_of_this_user(accepted):
                accepted.close()
                continue
            self._waiting += 1
            self._spawn(self._serve(accepted))

    async def _serve(self, connection: socket.socket) -> None:
        """Hands a memory over, and holds it until the connection ends or it is given up."""
        with connection:
            try:
                place = await self._welcome(connection)
            finally:
                self._waiting -= 1
            if place is not None:
                try:
                    await self._hold(place, connection)
                except OSError as error:
                    logger.debug("memory of run %s is not shared: %s", place.run.name, error)

    async def _welcome(self, connection: socket.socket) -> _Place | None:
        """The place whose ticket is shown, if one is."""
        loop, shown = asyncio.get_running_loop(), b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_TICKET_S):
                while not shown.endswith(b"\n") and len(shown) <= 2 * _TICKET_BYTES:
                    if not (data := await loop.sock_recv(connection, 64)):
                        return None
                    shown += data
        place = self._tickets.pop(shown.rstrip(b"\n").decode("latin-1"), None)
        if place is not None:
            assert place.expiry is not None
            place.expiry.cancel()
            place.serving = asyncio.current_task()
        return place

    async def _hold(self, place: _Place, connection: socket.socket) -> None:
        layout, loop, making = place.layout, asyncio.get_running_loop(), None
        try:
            if self._shown > _MOST or not self._budget.lend(layout.size):
                raise OSError("there is no memory to spare any more")
            self._shared.inc(layout.size)
            making = loop.run_in_executor(self._threads, self._made, layout)
            place.memory = memory = await uninterrupted(making)
            grant = MemoryGrant(memory=place.name, size=layout.size, body=layout.body, tensors=layout.tensors)
            line = grant.model_dump_json().encode() + b"\n"
            with memory.handing_over() as descriptor:
                socket.send_fds(connection, [line], [descriptor])
            # The client has nothing more to say: this ends with the connection.
            await loop.sock_recv(connection, 1)
        finally:
            if making is not None:
                if making.exception() is None:
                    making.result().close()
                else:
                    self._freed(layout.size)
            place.serving = None
            if self._places.get(place.holder) is place:
                del self._places[place.holder]

    def _made(self, layout: Layout) -> SharedMemory:
        """Raises OSError where less than twice as much is there: what is counted may be in use by others."""
        if 2 * layout.size > (available := available_memory()):
            raise OSError(f"{available} bytes are available, and {layout.size} of them are not to spare")
        return SharedMemory(layout, self._locks, self._threads, partial(self._freed, layout.size))

    def _freed(self, size: int) -> None:
        self._budget.give_back(size)
        self._shared.dec(size)

    # Leases that end

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for place in list(self._places.values()):
                if not await _is_good(place):
                    self._end(place)


def _listening(name: str) -> socket.socket:
    """A Unix socket without a file: its name is gone with the process. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.bind(f"\0{name}")
        made.listen(_MOST_WAITING)
    except OSError:
        made.close()
        raise
    return made


async def _is_good(place: _Place) -> bool:
    """Whether a place's lease is good, as far as can be told, and its shard this process's."""
    run = place.run
    if run.is_gone or not run.owns(place.shard):
        return False
    try:
        # As of a push that never comes: it changes nothing, the lease's time neither.
        await run.coordinator.pushes.precheck(Claim(place.lease, place.token, 0, secrets.token_hex(_TICKET_BYTES)))
    except (LeaseExpired, EpochChanged, RunNotFound):
        return False
    except ProblemError as error:
        logger.debug("a lease of run %s cannot be looked at: %s", run.name, error)
    return True
