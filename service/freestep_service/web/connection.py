"""HTTP connections on which a large body goes from the socket straight to where it belongs.

uvicorn's protocol parses the head of a request and then stops reading: the body waits in the kernel, and its sender
with it, until the application says where it is to lie. Then the connection is read into that memory, nothing in
between, up to the body's last byte and not beyond; after it uvicorn's protocol has the connection back. Who does not
ask for that, and every small body, has uvicorn's own way.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from freestep.errors import MalformedRequest, ProblemError
from freestep.wire.receiver import Sink, lay
from freestep_service.web.problems import problem_response

__all__ = ["INLET", "Connection", "Inlet"]

INLET = "freestep.inlet"
"""The ASGI extension that a request with a large body comes with: its Inlet."""
_SMALL = 64 * 1024
"""Bytes of a body that arrives with the head of its request, or soon after it."""
_SCRATCH = 256 * 1024
_FAREWELL_S = 0.05
"""Within which ours has left."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol; requests with large bodies come with an Inlet, and what is not HTTP is refused."""

    _refusal = b""
    """The answer to what could not be parsed, which is the connection's last."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        length = self._body_length()
        if length > _SMALL:
            self.flow.pause_reading()
            self.scope["extensions"] = {INLET: Inlet(self, self.cycle, length)}  # type: ignore[dict-item]
            if self.cycle.waiting_for_100_continue:
                # Answered before it is told to go on, the sender may or may not send the body, RFC 9110 section 10.1.1.
                self.cycle.keep_alive = False

    def shutdown(self) -> None:
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            # TLS would wait for the client's farewell, and an idle client says it only when it comes to ask again.
            self.loop.call_later(_FAREWELL_S, self.transport.abort)

    def _body_length(self) -> int:
        """What Content-Length says; 0 where it does not say how long the body is."""
        length = 0
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"upgrade" and self.parser.should_upgrade()):
                return 0
            if name == b"content-length" and value.isdigit():
                length = int(value)
        return length

    def send_400_response(self, msg: str) -> None:
        """Answers what cannot be parsed with a problem document, and ends the connection.

        uvicorn's protocol calls this where it has caught what the parser raised.
        """
        # Nothing that follows can be understood.
        self.flow.pause_reading()
        if self._refusal:
            return
        self._refusal = self._refusal_of(MalformedRequest(f"what was sent cannot be read as HTTP: {sys.exception()}"))
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._refuse()
        elif not cycle.more_body:
            # It came behind requests that are yet to be answered, and is answered after them.
            return
        elif self.pipeline:
            # It was in the body of a request that has not begun, the last of several.
            self.pipeline.popleft()
        elif cycle.response_started:
            self.transport.close()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._refuse()

    def on_response_complete(self) -> None:
        was_last = not self.pipeline
        super().on_response_complete()
        if self._refusal:
            self.flow.pause_reading()
            if was_last:
                self._refuse()

    def _refusal_of(self, problem: ProblemError) -> bytes:
        answer = problem_response(problem)
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % header for header in headers]
        return b"".join([STATUS_LINE[answer.status_code], *lines, b"\r\n", answer.body])

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._refusal)
            self.transport.close()

    def hand_over(self, inflow: _Inflow) -> None:
        """Has the connection read by another."""
        self.flow.pause_reading()
        self.transport.set_protocol(inflow)
        self.flow.resume_reading()

    def take_back(self) -> None:
        """Goes on behind the end of a body."""
        self.flow.pause_reading()
        # The old parser still waits for the body.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.transport.set_protocol(self)
        self.flow.resume_reading()
        if not self.cycle.response_complete:
            self.on_message_complete()


class Inlet:
    """A body of `length` bytes of which the application has seen nothing yet."""

    def __init__(self, connection: Connection, cycle: RequestResponseCycle, length: int) -> None:
        self._connection = connection
        self._cycle = cycle
        self._length = length
        self._keep_alive = cycle.keep_alive

    async def pour(self, sink: Sink, stall_s: float, deadline: float) -> None:
        """Returns when the whole body is in the sink, which has room for it; once is enough.

        Raises what the sink raises, EOFError when the connection ends before the body, and TimeoutError when nothing
        comes for `stall_s` seconds, or not everything until `deadline` of the event loop's clock. What is then left
        of the body is read and thrown away, so that the connection can be answered and used again.
        """
        cycle, transport = self._cycle, self._connection.transport
        early, cycle.body = memoryview(cycle.body), bytearray()
        lay(sink, early)
        missing = self._length - len(early)
        if not missing:
            return
        if cycle.disconnected or transport.is_closing():
            raise EOFError
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue, cycle.keep_alive = False, self._keep_alive
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        inflow = _Inflow(self._connection, sink, missing)
        self._connection.hand_over(inflow)
        try:
            await inflow.wait(stall_s, deadline)
        finally:
            inflow.leave()


class _Inflow(asyncio.BufferedProtocol):
    """Reads the last `missing` bytes of a body into a sink, as long as that wants them."""

    def __init__(self, connection: Connection, sink: Sink, missing: int) -> None:
        self._connection = connection
        self._sink: Sink | None = sink
        self._missing = missing
        self._clock = connection.loop.time
        self._heard = self._clock()
        self._over = asyncio.Event()
        self._error: Exception | None = None

    async def wait(self, stall_s: float, deadline: float) -> None:
        """As `Inlet.pour`."""
        while not self._over.is_set():
            until = min(self._heard + stall_s, deadline)
            if until <= self._clock():
                raise TimeoutError
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._over.wait()
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """From here on the sink's memory is somebody else's."""
        self._sink = None

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._sink is None:
            return memoryview(bytearray(min(self._missing, _SCRATCH)))
        return self._sink.get_buffer()[: self._missing]

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = self._clock()
        self._missing -= nbytes
        if self._sink is not None:
            try:
                self._sink.buffer_updated(nbytes)
            except Exception as error:
                self._end(error)
        if not self._missing:
            self._end(None)
            self._connection.take_back()

    def _end(self, error: Exception | None) -> None:
        if not self._over.is_set():
            self._error = error
            self._over.set()
        self._sink = None

    def eof_received(self) -> Any:
        self._end(EOFError())
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(EOFError())
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
