"""A connection of the service's own kind without a network: its bytes are fed, and what it answers is kept."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from freestep_service.web.connection import Connection
from freestep_service.web.head import Bounds
from freestep_service.web.places import Place

_TURNS = 20
"""More turns of the event loop than a request takes between two of its reads."""
_HIGH_WATER, _LOW_WATER = 64 * 1024, 16 * 1024
"""Bytes in the buffer above which writing is paused, and at which it is resumed; those of asyncio and uvloop."""


class FakeTransport(asyncio.Transport):
    """Delivers what is fed while reading is not paused, and keeps what is written, as a socket's transport does.

    reads: how many bytes of answers the peer reads; the others stay in the buffer, as what they were written as.
    protocol: uvicorn's own, to compare. bounds, place: those of the service's.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        reads: int | None = None,
        protocol: type[HttpToolsProtocol] = Connection,
        bounds: Bounds | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__()
        self.written = bytearray()
        """What the peer has read."""
        self.buffer: deque[bytes | bytearray | memoryview] = deque()
        self.is_aborted = False
        self.has_written_eof = False
        self._reads = reads
        self._closing = False
        self._is_lost = False
        self._reading = True
        self._is_full = False
        self._inbox = bytearray()
        self._ends = False
        # Its own configuration would keep its log from the root logger.
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None)
        given = {name: each for name, each in (("bounds", bounds), ("place", place)) if each is not None}
        self.connection: Any = protocol(config, ServerState(), {}, **given)
        self._protocol: Any = self.connection
        self._protocol.connection_made(self)

    # The peer's side

    def feed(self, data: bytes) -> None:
        """Sends bytes."""
        self._inbox += data
        self._deliver()

    def feed_eof(self) -> None:
        """Ends the peer's side, behind what was fed."""
        self._ends = True
        self._deliver()

    def lose(self) -> None:
        """Cuts the connection off, as a peer does that is gone."""
        self.abort()

    async def turn(self) -> None:
        """Lets everything happen that needs no more bytes."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    # The protocol's side

    def _deliver(self) -> None:
        while self._inbox and self._reading and not self._closing:
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                buffer = self._protocol.get_buffer(-1)
                size = min(len(buffer), len(self._inbox))
                buffer[:size], taken = self._inbox[:size], size
                del self._inbox[:taken]
                self._protocol.buffer_updated(size)
            else:
                data, self._inbox = bytes(self._inbox), bytearray()
                self._protocol.data_received(data)
        if self._ends and not self._inbox and self._reading and not self._closing:
            self._ends = False
            if not self._protocol.eof_received():
                self.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        asyncio.get_running_loop().call_soon(self._deliver)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self.buffer.append(data)
            self._send()
            if not self._is_full and self.get_write_buffer_size() > _HIGH_WATER:
                self._is_full = True
                self._protocol.pause_writing()

    def read(self, size: int) -> None:
        """Has the peer read some bytes more."""
        assert self._reads is not None
        self._reads += size
        self._send()
        if self._is_full and self.get_write_buffer_size() <= _LOW_WATER:
            self._is_full = False
            self._protocol.resume_writing()
        self._end_if_sent()

    def _send(self) -> None:
        while self.buffer and (self._reads is None or self._reads > 0):
            piece = self.buffer.popleft()
            size = len(piece) if self._reads is None else min(len(piece), self._reads)
            self.written += piece[:size]
            if size < len(piece):
                self.buffer.appendleft(piece[size:])
            if self._reads is not None:
                self._reads -= size

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.buffer))

    def is_closing(self) -> bool:
        return self._closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_written_eof = True

    def close(self) -> None:
        self._closing = True
        self._end_if_sent()

    def _end_if_sent(self) -> None:
        if self._closing and not self.buffer and not self._is_lost:
            self._is_lost = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.is_aborted = True
        self.buffer.clear()
        self.close()
