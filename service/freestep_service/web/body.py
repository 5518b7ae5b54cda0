"""Request bodies, received from the socket into the memory where their tensors belong.

A Body is what the rest of the service gets of a request: what comes before it is decided by the claim, what comes after
it works on the flat vector.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import xxhash
from starlette.requests import ClientDisconnect, Request

from freestep.errors import MalformedRequest
from freestep.wire.receiver import Sink, lay
from freestep_service.state.staging import Body as AnyBody
from freestep_service.web.inlet import INLET

__all__ = ["SLOWEST", "Body", "GuardedBody", "stalled"]

SLOWEST = 64 * 1024
"""Bytes a second, below which a sender may not hold memory that others wait for."""
_SCRATCH = 256 * 1024
"""Bytes that are read at a time of a body that is only digested."""


class Body:
    """The body of a request, `length` bytes, not read so far.

    It is refused if nothing arrives for `stall_s` seconds, or if it is slower than SLOWEST on average beyond these.
    """

    def __init__(self, request: Request, length: int, stall_s: float) -> None:
        self.length = length
        self._request = request
        self._stall_s = stall_s

    async def receive_into(self, receiver: Sink) -> str:
        """Fills the receiver and returns the digest of the bytes.

        Raises MalformedTensors as the receiver does, and MalformedRequest if the body stalls or ends early.
        """
        return await self._pour(receiver)

    async def receive_digest(self) -> str:
        """Reads the body for its digest alone; raises MalformedRequest as above."""
        return await self._pour(_Discard(self.length))

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
            raise stalled(self._stall_s) from None
        except (ClientDisconnect, EOFError):
            raise MalformedRequest("the body ended before its Content-Length") from None
        return digested.hexdigest()

    async def _stream(self, sink: Sink, deadline: float) -> None:
        """As `Inlet.pour`, from ASGI messages."""
        loop, chunks, missing = asyncio.get_running_loop(), self._request.stream(), self.length
        while missing > 0:
            async with asyncio.timeout_at(min(loop.time() + self._stall_s, deadline)):
                chunk = await anext(chunks, b"")
            if not chunk:
                raise EOFError
            lay(sink, chunk)
            missing -= len(chunk)


class GuardedBody:
    """A body that counts only if its sender is let in still when it has come, which may take hours.

    require_let_in: raises Unauthenticated where the sender's token has ended.
    """

    def __init__(self, body: AnyBody, require_let_in: Callable[[], None]) -> None:
        self.length = body.length
        self._body = body
        self._require_let_in = require_let_in

    async def receive_into(self, receiver: Sink) -> str:
        """As the body's, and raises Unauthenticated."""
        digest = await self._body.receive_into(receiver)
        self._require_let_in()
        return digest

    async def receive_digest(self) -> str:
        """As the body's, and raises Unauthenticated."""
        digest = await self._body.receive_digest()
        self._require_let_in()
        return digest


def stalled(stall_s: float) -> MalformedRequest:
    """The refusal of a body of which nothing came for `stall_s` seconds, or that was too slow beyond these."""
    return MalformedRequest(f"nothing of the body came for {stall_s:g} s, or it came too slowly")


class _Digested:
    """Digests bytes on their way into a sink, while they are in the processor's cache."""

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


class _Discard:
    """A sink for `length` bytes that keeps none of them."""

    def __init__(self, length: int) -> None:
        self._buffer = memoryview(bytearray(min(length, _SCRATCH)))

    def get_buffer(self) -> memoryview:
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        pass
