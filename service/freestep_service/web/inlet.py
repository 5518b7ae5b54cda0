"""A large request body, received from the socket straight into the memory that the application gives for it.

While a body is received, an `_Inflow` is the transport's protocol in place of the connection: asyncio then reads into
the sink's buffers, without a copy in between, up to the body's last byte and not beyond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from freestep.wire.receiver import Sink, lay

__all__ = ["INLET", "Inlet"]

INLET = "freestep.inlet"
"""The ASGI extension of a request with a large body: its Inlet."""
_SCRATCH = 256 * 1024
"""Bytes that are read at a time of a body that is thrown away."""


class Inlet:
    """The body of the request that `protocol` has just parsed the head of: `length` bytes, not read so far.

    `give_back` is called behind the body's last byte, to make `protocol` the transport's protocol again; `on_rest` when
    bytes have come that are thrown away.
    """

    def __init__(
        self,
        protocol: HttpToolsProtocol,
        length: int,
        give_back: Callable[[], None],
        on_rest: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        self._cycle = protocol.cycle
        self._length = length
        self._give_back = give_back
        self._on_rest = on_rest

    async def pour(self, sink: Sink, stall_s: float, deadline: float) -> None:
        """Receives the whole body into a sink that has room for it; to be called once.

        Raises what the sink raises, EOFError if the connection ends before the body does, and TimeoutError if nothing
        arrives for `stall_s` seconds or the body is not complete at `deadline`, a time of the event loop's clock. What
        is then left of the body is read and thrown away, so that the connection can be used for the next request.
        """
        cycle, protocol, transport = self._cycle, self._protocol, self._protocol.transport
        early, cycle.body = memoryview(cycle.body), bytearray()
        lay(sink, early)
        missing = self._length - len(early)
        if not missing:
            return
        if cycle.disconnected or transport.is_closing():
            raise EOFError
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        inflow = _Inflow(protocol, sink, missing, self._give_back, self._on_rest)
        protocol.flow.pause_reading()
        transport.set_protocol(inflow)
        protocol.flow.resume_reading()
        try:
            await inflow.wait(stall_s, deadline)
        finally:
            inflow.detach_sink()


class _Inflow(asyncio.BufferedProtocol):
    """Reads the last `missing` bytes of a body into a sink, until the sink raises or is detached."""

    def __init__(
        self,
        protocol: HttpToolsProtocol,
        sink: Sink,
        missing: int,
        give_back: Callable[[], None],
        on_rest: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        self._sink: Sink | None = sink
        self._missing = missing
        self._give_back = give_back
        self._on_rest = on_rest
        self._clock = protocol.loop.time
        self._progressed_at = self._clock()
        self._ended = asyncio.Event()
        self._error: Exception | None = None

    async def wait(self, stall_s: float, deadline: float) -> None:
        """As `Inlet.pour`."""
        while not self._ended.is_set():
            until = min(self._progressed_at + stall_s, deadline)
            if until <= self._clock():
                raise TimeoutError
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._ended.wait()
        if self._error is not None:
            raise self._error

    def detach_sink(self) -> None:
        """From here on the sink's memory may be used for something else."""
        self._sink = None

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._sink is None:
            return memoryview(bytearray(min(self._missing, _SCRATCH)))
        return self._sink.get_buffer()[: self._missing]

    def buffer_updated(self, nbytes: int) -> None:
        self._progressed_at = self._clock()
        self._missing -= nbytes
        if self._sink is not None:
            try:
                self._sink.buffer_updated(nbytes)
            except Exception as error:
                self._end(error)
        else:
            self._on_rest()
        if not self._missing:
            self._end(None)
            self._give_back()

    def _end(self, error: Exception | None) -> None:
        if not self._ended.is_set():
            self._error = error
            self._ended.set()
        self._sink = None

    def eof_received(self) -> Any:
        self._end(EOFError())
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(EOFError())
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
