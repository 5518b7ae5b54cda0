"""Connections that a test feeds with bytes: requests, and an application that takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect

from freestep_service.web.head import Bounds
from freestep_service.web.inlet import INLET

__all__ = ["BODY", "BOUNDS", "HEAD", "NEXT", "OK", "App", "Memory", "run"]

BODY = bytes(range(40))
HEAD = b"POST /a?b=c HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(BODY)
NEXT = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


BOUNDS = Bounds(small_bytes=16)
"""Bodies of more bytes are large."""


class Memory:
    """A sink that takes at most seven bytes at a time."""

    def __init__(self) -> None:
        self.received = bytearray()
        self._buffer = bytearray(7)

    def get_buffer(self) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, size: int) -> None:
        self.received += self._buffer[:size]


class App:
    """Keeps the bodies of its requests, those that come by an Inlet, and the errors that ended them."""

    def __init__(self, use_inlet: bool = True) -> None:
        self.bodies: list[bytes] = []
        self.errors: list[Exception] = []
        self._use_inlet = use_inlet

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        inlet = scope["extensions"].get(INLET)
        if inlet is not None and self._use_inlet:
            sink = Memory()
            try:
                await inlet.pour(sink, 10.0, asyncio.get_running_loop().time() + 10.0)
                self.bodies.append(bytes(sink.received))
            except EOFError as error:
                self.errors.append(error)
        else:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.errors.append(ClientDisconnect())
                    return
                body, more = body + message["body"], message["more_body"]
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})
