"""From the socket into memory: a body is received straight into the places where its tensors belong.

`Body` is the seam between the web and the shard: everything before it is decided by the
claim, everything after it works on the flat vector.
"""

from __future__ import annotations

import asyncio

import xxhash
from starlette.requests import ClientDisconnect, Request

from freestep.errors import MalformedRequest
from freestep.wire.receiver import Receiver, Sink, lay
from freestep_service.web.inlet import INLET

__all__ = ["Body"]

SLOWEST = 64 * 1024
"""Bytes a second: who sends more slowly may not hold memory that others wait for."""
_UNKEPT = 256 * 1024
"""Bytes at a time of a body that is only digested."""


class Body:
    """A request's body that has not been read: `length` bytes.

    It may not stand still for `stall_s` seconds, nor drip: beyond those seconds it has to come at SLOWEST on average.
    """

    def __init__(self, request: Request, length: int, stall_s: float) -> None:
        self.length = length
        self._request = request
        self._stall_s = stall_s

    async def receive_into(self, receiver: Receiver) -> str:
        """Fills the receiver and returns the digest of the bytes.

        Raises MalformedTensors as the receiver does, and MalformedRequest when the body ends or stalls early.
        """
        return await self._pour(receiver)

    async def receive_digest(self) -> str:
        """Reads the body for its digest alone; raises MalformedRequest as above."""
        return await self._pour(_Nowhere(self.length))

    async def _pour(self, sink: Sink) -> str:
        digested = _Digested(sink)
        deadline = asyncio.get_running_loop().time() + self._stall_s + self.length / SLOWEST
        inlet = self._request.scope.get("extensions", {}).get(INLET)
        try:
            if inlet is not None:
                await inlet.pour(digested, self._stall_s, deadline)
            else:
                await self._stream(digested, deadline)
        except TimeoutError:
            raise MalformedRequest(f"the body stood still for {self._stall_s:g} s, or came too slowly") from None
        except (ClientDisconnect, EOFError):
            raise MalformedRequest("the body ended before its Content-Length") from None
        return digested.hexdigest()

    async def _stream(self, sink: Sink, deadline: float) -> None:
        """As `Inlet.pour`, from the ASGI server's messages."""
        loop, chunks, missing = asyncio.get_running_loop(), self._request.stream(), self.length
        while missing > 0:
            async with asyncio.timeout_at(min(loop.time() + self._stall_s, deadline)):
                chunk = await anext(chunks, b"")
            if not chunk:
                raise EOFError
            lay(sink, chunk)
            missing -= len(chunk)


class _Digested:
    """A sink whose bytes are digested on their way, while the processor still has them at hand."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._buffer = memoryview(b"")
        self._digest = xxhash.xxh3_128()
        self.hexdigest = self._digest.hexdigest

    def get_buffer(self) -> memoryview:
        self._buffer = self._sink.get_buffer()
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        self._digest.update(self._buffer[:size])
        self._sink.buffer_updated(size)


class _Nowhere:
    """A sink that has room for `length` bytes and keeps none of them."""

    def __init__(self, length: int) -> None:
        self._buffer = memoryview(bytearray(min(length, _UNKEPT)))

    def get_buffer(self) -> memoryview:
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        pass
