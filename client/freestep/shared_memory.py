"""Memory that a client shares with a service on the same machine, so that large bodies cross no socket.

It is had under a lease, for one shard: offered over HTTP, fetched from a Unix socket of the service's, whose process
has to be the user's own, as the service asks of this one. Pushes and pulls are the same requests as ever; but their
bodies are where a header says. Whatever goes wrong, bodies go over the connection.

The law of this file: a memory belongs to one request at a time, from when its body is copied in until its answer is
copied out. Where no answer has come, the service may still be using it, and it is not used again.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import select
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

from freestep.api.memory import SOCKET_NAME, MemoryGrant, MemoryOffer, MemoryRequest
from freestep.bulk_exchange import poll_socket
from freestep.errors import FreestepError, MalformedTensors, MemoryNotShared, ProblemError
from freestep.forks import ForkLock
from freestep.listeners import leads_here
from freestep.service_url import without_password
from freestep.wire.receiver import Sink, free_part
from freestep.wire.spans import Span, copy_bytes
from freestep.wire.unix_peers import is_of_this_user

__all__ = ["Bodies", "SharedMemories", "SharedMemory", "obstacle"]

logger = logging.getLogger("freestep")

_IS_POSSIBLE = sys.platform == "linux"
_SMALLEST = 1024 * 1024
"""Bytes of a body, or of an answer's tensors, that gains by it."""
_CONNECT_S = 5.0
"""Seconds for the service to hand the memory over, beside those in which it makes the pages."""
_SLOWEST_PAGES = 128 * 1024**2
"""Bytes a second at which pages are made, at the least."""
_AGAIN_S = 60.0
"""Seconds until memory is asked for again, where there was none."""
_LONGEST_PAUSE_S = 3600.0
_LONGEST_GRANT = 4096
_STRIDE = 16 * 1024**2
"""Bytes that are copied at once, between which the interpreter hears of signals."""

Ask = Callable[[str, str, dict[str, Any]], Any]
"""Asks a service, by its URL, for memory: a path and a document, for that of the answer. Raises FreestepError."""


@dataclass(frozen=True)
class Bodies:
    """What a request moves: the tensors of which run, by its path, and shard.

    answer_bytes: of the answer's tensors. lease, token: under which it pushes; without them, it takes what memory there
    is.
    """

    path: str
    shard: int
    answer_bytes: int
    lease: str = ""
    token: int = 0


class SharedMemory:
    """A memory, and the connection that it lasts as long as.

    connection: to the service. memory: mapped, all of it. grant: what lies where in it.
    """

    def __init__(self, connection: socket.socket, memory: mmap.mmap, grant: MemoryGrant) -> None:
        self._connection = connection
        self._bytes = memoryview(memory)
        self._grant = grant
        self.is_lent = False

    @property
    def is_open(self) -> bool:
        """Whether the service has it too, as far as can be seen."""
        try:
            return not poll_socket(self._connection, select.POLLIN | select.POLLHUP, 0.0)
        except ValueError:
            # This side has closed it.
            return False

    @property
    def room(self) -> tuple[int, int]:
        """Bytes of the longest body, and of the tensors of the longest answer, that it has room for."""
        return self._grant.body, self._grant.size - self._grant.tensors

    def has_room(self, body_bytes: int, answer_bytes: int) -> bool:
        """Whether such a body, and an answer with such tensors, fit."""
        body, answer = self.room
        return body_bytes <= body and answer_bytes <= answer

    def headers(self, body: Sequence[memoryview] | None) -> Mapping[str, str]:
        """Copies a body in, if there is one; the headers that say where it is, and which memory."""
        headers = {"Freestep-Memory": self._grant.memory}
        if body is None:
            return headers
        at = 0
        for piece in body:
            for begin in range(0, len(piece), _STRIDE):
                part = piece[begin : begin + _STRIDE]
                copy_bytes(self._bytes[at : at + len(part)], part)
                at += len(part)
        return {**headers, "Freestep-Span": str(Span(0, at))}

    def pour(self, span: Span, sink: Sink) -> None:
        """Copies an answer out, into a sink. Raises what the sink raises, and ValueError where it cannot lie there."""
        if span.end > len(self._bytes):
            raise ValueError(f"the memory has no bytes {span}")
        source = self._bytes[span.begin : span.end]
        while source:
            buffer = free_part(sink)
            size = min(len(buffer), len(source), _STRIDE)
            copy_bytes(buffer[:size], source[:size])
            sink.buffer_updated(size)
            source = source[size:]

    def close(self) -> None:
        """Gives it up, and so does the service; its pages are there until the last request that uses it has ended."""
        self._connection.close()


_Key = tuple[str, str, int, str]
"""The URL of a service, the path of a run, a shard, and a lease."""


class SharedMemories:
    """The memories of one client. Safe to use from several threads; a forked child begins with none.

    is_wanted: False uses none.
    """

    def __init__(self, *, is_wanted: bool = True) -> None:
        self._is_wanted = is_wanted and _IS_POSSIBLE
        self._lock = ForkLock()
        self._held: dict[_Key, SharedMemory] = {}
        self._asking: set[_Key] = set()
        """For whom memory is being fetched, and has not been given up meanwhile."""
        self._again_at: dict[_Key, float] = {}
        """When to ask again where there was none, by the monotonic clock."""
        self._pauses: dict[_Key, float] = {}
        """Seconds of the last pause, where the service did not find memory that it had given."""
        self._are_here: dict[str, bool] = {}
        """By a service's URL, whether it leads to this machine."""
        _all.add(self)

    def has(self, path: str) -> bool:
        """Whether there is memory for bodies of a run, by its path."""
        with self._lock.held:
            return any(held == path and memory.is_open for (_, held, *_), memory in self._held.items())

    @contextmanager
    def lent(self, url: str, bodies: Bodies | None, body_bytes: int, ask: Ask) -> Iterator[SharedMemory | None]:
        """The memory for one request, which has ended when the block does; None to send bodies over the connection.

        url: of the service that is to get the request. ask: asks it for memory.
        """
        memory = self._lend(url, bodies, body_bytes, ask) if bodies is not None and self._is_wanted else None
        if memory is None:
            yield None
            return
        try:
            yield memory
        except (MemoryNotShared, MalformedTensors):
            # An older service, or one behind a proxy that drops headers, has found an empty body.
            self._put_off(memory)
            raise
        except ProblemError:
            # An answer has come.
            raise
        except BaseException:
            memory.close()
            raise
        else:
            self._served(memory)
        finally:
            memory.is_lent = False

    def _lend(self, url: str, bodies: Bodies, body_bytes: int, ask: Ask) -> SharedMemory | None:
        if max(body_bytes, bodies.answer_bytes) < _SMALLEST or not self._is_here(url):
            return None
        key = url, bodies.path, bodies.shard, bodies.lease
        with self._lock.held:
            self._let_go(lambda _, memory: not memory.is_lent and not memory.is_open)
            found = self._find(key)
            if found is not None:
                if found.is_lent:
                    return None
                if found.has_room(body_bytes, bodies.answer_bytes):
                    found.is_lent = True
                    return found
            if not bodies.lease or key in self._asking or time.monotonic() < self._again_at.get(key, 0.0):
                return None
            self._asking.add(key)
            self._held.pop(key, None)
        body, answer = found.room if found is not None else (0, 0)
        memory = None
        try:
            fetched = _fetch(url, bodies, max(body, body_bytes), max(answer, bodies.answer_bytes), ask)
            if fetched.has_room(body_bytes, bodies.answer_bytes):
                memory = fetched
            else:
                # The run may have been resharded meanwhile.
                fetched.close()
                raise ValueError("the memory is too small")
        except (FreestepError, OSError, ValueError) as error:
            logger.debug("bodies for %s%s go over connections: %s", without_password(url), bodies.path, error)
        finally:
            if found is not None:
                found.close()
            with self._lock.held:
                is_given_up = key not in self._asking
                self._asking.discard(key)
                if memory is not None and not is_given_up:
                    self._again_at.pop(key, None)
                    self._held[key] = memory
                    memory.is_lent = True
                elif memory is not None:
                    memory.close()
                    memory = None
                elif not is_given_up:
                    self._again_at[key] = time.monotonic() + _AGAIN_S
        return memory

    def _put_off(self, memory: SharedMemory) -> None:
        """Gives up a memory that the service has not, or no more, and asks for none in its place for a while.

        It may be another of the service's processes that got the request, as behind a load balancer: so the while is
        twice as long each time, until a request finds its memory.
        """
        with self._lock.held:
            for key in [key for key, held in self._held.items() if held is memory]:
                del self._held[key]
                pause = min(2 * self._pauses[key], _LONGEST_PAUSE_S) if key in self._pauses else _AGAIN_S
                self._pauses[key] = pause
                self._again_at[key] = time.monotonic() + pause
        memory.close()

    def _served(self, memory: SharedMemory) -> None:
        with self._lock.held:
            if self._pauses:
                self._pauses = {key: pause for key, pause in self._pauses.items() if self._held.get(key) is not memory}

    def _find(self, key: _Key) -> SharedMemory | None:
        """The memory of a lease; without one, any for the shard."""
        *place, lease = key
        if lease:
            return self._held.get(key)
        return next((memory for (*held, _), memory in self._held.items() if held == place), None)

    def _is_here(self, url: str) -> bool:
        if url not in self._are_here:
            self._are_here[url] = leads_here(urlsplit(url).hostname or "")
        return self._are_here[url]

    def forget(self, lease: str) -> None:
        """Gives up the memories of a lease that has ended."""
        with self._lock.held:
            self._let_go(lambda key, _: key[-1] == lease)
            self._asking = {key for key in self._asking if key[-1] != lease}
            self._again_at = {key: then for key, then in self._again_at.items() if key[-1] != lease}
            self._pauses = {key: pause for key, pause in self._pauses.items() if key[-1] != lease}

    def close(self) -> None:
        """Gives up all."""
        with self._lock.held:
            self._let_go(lambda *_: True)
            self._asking.clear()

    def _let_go(self, is_over: Callable[[_Key, SharedMemory], bool]) -> None:
        for key, memory in list(self._held.items()):
            if is_over(key, memory):
                del self._held[key]
                memory.close()


def _fetch(url: str, bodies: Bodies, body_bytes: int, answer_bytes: int, ask: Ask) -> SharedMemory:
    """Asks for a memory and fetches it. Raises FreestepError, OSError and ValueError where there is none to be had."""
    wish = MemoryRequest(token=bodies.token, shard=bodies.shard, body_bytes=body_bytes, answer_bytes=answer_bytes)
    offer = MemoryOffer.model_validate(ask(url, f"{bodies.path}/leases/{bodies.lease}/memory", wish.model_dump()))
    connection = _connected(offer.socket)
    try:
        connection.settimeout(_CONNECT_S + (body_bytes + answer_bytes) / _SLOWEST_PAGES)
        connection.sendall(offer.ticket.encode() + b"\n")
        line, descriptors = _received(connection)
        try:
            if not descriptors:
                raise OSError("the service has handed over no memory")
            grant = MemoryGrant.model_validate_json(line)
            if not grant.body <= grant.tensors <= grant.size:
                raise ValueError(f"a memory of {grant.size} bytes has no such places in it")
            if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise OSError("the memory might shrink under whoever uses it")
            memory = mmap.mmap(descriptors[0], grant.size)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return SharedMemory(connection, memory, grant)
    except BaseException:
        connection.close()
        raise


def _connected(name: str) -> socket.socket:
    """A connection to a service's Unix socket. Raises OSError where it is not here, or not of this user."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_S)
        connection.connect(f"\0{name}")
        if not is_of_this_user(connection):
            raise OSError("the service is not of this user")
    except ConnectionRefusedError:
        connection.close()
        raise OSError("the service's Unix socket is not in this network namespace") from None
    except BaseException:
        connection.close()
        raise
    return connection


def _received(connection: socket.socket) -> tuple[bytes, Sequence[int]]:
    """What comes next, and the descriptors beside it, at most one, which no process inherits that is started."""
    # socket.recv_fds has no flags in Python 3.11, though it takes them.
    descriptors = array("i")
    line, beside, _, _ = connection.recvmsg(
        _LONGEST_GRANT, socket.CMSG_LEN(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data)
    return line, descriptors


def obstacle(url: str, name: str | None) -> str | None:
    """Why bodies for a service go over connections; None if they may go through memory.

    url: the service's. name: of its Unix socket, as it says; None if it shares no memory.
    """
    if not _IS_POSSIBLE:
        return "this system is not Linux"
    if not leads_here(urlsplit(url).hostname or ""):
        return "the service is on another machine"
    if name is None or re.fullmatch(SOCKET_NAME, name) is None:
        return "the service shares no memory"
    try:
        _connected(name).close()
    except OSError as error:
        return str(error)
    return None


_all: WeakSet[SharedMemories] = WeakSet()


def _leave_all_to_parent() -> None:
    # Else a child that outlives its parent would keep the connections open, and with them the memory.
    for memories in _all:
        memories.close()


os.register_at_fork(after_in_child=_leave_all_to_parent)
