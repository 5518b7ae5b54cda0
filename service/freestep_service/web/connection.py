"""HTTP connections: uvicorn's protocol, with large bodies received in place and problem documents for what is not HTTP.

uvicorn's protocol parses the head of a request. If the body is large, reading then pauses: the body waits in the
kernel, and so does its sender, until the application gives memory for it (`inlet`). Small bodies, and those of unknown
length, are read by uvicorn.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from freestep.errors import MalformedRequest, ProblemError
from freestep_service.web.inlet import INLET, Inlet
from freestep_service.web.problems import problem_response

__all__ = ["CONNECTION", "Connection", "abort", "takes_more"]

CONNECTION = "freestep.connection"
"""The ASGI extension of every request: the Connection that it came over."""
_SMALL = 64 * 1024
"""Bytes of a body that is likely to arrive together with the head of its request."""
_LONGEST_HEAD = 64 * 1024
"""Bytes of a request's head, or of the trailers behind its body."""
_CLOSE_NOTIFY_S = 0.05
"""Seconds within which our own close_notify has been sent."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with an Inlet for large bodies; the application can abort it, and be notified of its end."""

    is_stopping = False
    """Whether the server is shutting down."""
    _refusal = b""
    """The answer to what could not be parsed, which is the connection's last."""
    _head_size = 0
    """Bytes received since the last end of a head or piece of a body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._extensions: dict[str, Any] = {CONNECTION: self}
        self._unanswered: deque[RequestResponseCycle] = deque()
        """The request that is being answered, and those behind it: of these, uvicorn's protocol knows the last one."""
        self._watchers: dict[Callable[[], None], bool] = {}
        """What to call when the connection ends, and whether to call it when the server's shutdown begins."""

    def data_received(self, data: bytes) -> None:
        self._head_size += len(data)
        super().data_received(data)
        if self._head_size > _LONGEST_HEAD:
            self._refuse_rest(MalformedRequest(f"the head of a request may have {_LONGEST_HEAD} bytes"))

    def on_body(self, body: bytes) -> None:
        self._head_size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_size = 0
        super().on_message_complete()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_headers_complete(self) -> None:
        self._head_size = 0
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        length = self._body_length()
        if length > _SMALL:
            self.flow.pause_reading()
            inlet: Any = Inlet(self, length, self._take_back)
            self.scope["extensions"] = {**self._extensions, INLET: inlet}
            if self.cycle.waiting_for_100_continue:
                # After a final answer in place of 100, the body may or may not follow: RFC 9110, section 10.1.1.
                self.cycle.keep_alive = False

    def _body_length(self) -> int:
        """The Content-Length; 0 if the length of the body is unknown."""
        length = 0
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"upgrade" and self.parser.should_upgrade()):
                return 0
            if name == b"content-length" and value.isdigit():
                length = int(value)
        return length

    def _take_back(self) -> None:
        """Parses the next request, behind a body that an Inlet has received."""
        self.flow.pause_reading()
        # The old parser still expects the body.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.transport.set_protocol(self)
        self.flow.resume_reading()
        if not self.cycle.response_complete:
            self.on_message_complete()

    # The end of the connection

    def abort(self) -> None:
        """Ends the connection at once. Nothing that is buffered is sent, nor referred to from here on."""
        self.transport.abort()
        self._disconnect()

    def _disconnect(self) -> None:
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    @contextmanager
    def watched(self, on_end: Callable[[], None], *, or_shutdown: bool) -> Iterator[None]:
        """Calls `on_end` once if the connection ends before the block does, or the server's shutdown begins."""
        if self.transport.is_closing() or (or_shutdown and self.is_stopping):
            on_end()
            yield
            return
        # The end of a connection that is not read from goes unnoticed.
        self.flow.resume_reading()
        self._watchers[on_end] = or_shutdown
        try:
            yield
        finally:
            self._watchers.pop(on_end, None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._disconnect()
        while self._watchers:
            on_end, _ = self._watchers.popitem()
            on_end()

    def shutdown(self) -> None:
        super().shutdown()
        self.is_stopping = True
        for on_end in [on_end for on_end, or_shutdown in self._watchers.items() if or_shutdown]:
            del self._watchers[on_end]
            on_end()
        if self.scheme == "https" and self.transport.is_closing():
            # TLS would wait for the client's close_notify, which an idle client sends when it next uses the connection.
            self.loop.call_later(_CLOSE_NOTIFY_S, self.transport.abort)

    # What is not HTTP

    def send_400_response(self, msg: str) -> None:
        """Refuses what cannot be parsed. uvicorn's protocol calls this where it catches the parser's exception."""
        self._refuse_rest(MalformedRequest(f"what was sent cannot be read as HTTP: {sys.exception()}"))

    def _refuse_rest(self, problem: ProblemError) -> None:
        """Answers what follows with a problem document, after the requests before it, and ends the connection."""
        # Nothing that follows can be understood.
        self.flow.pause_reading()
        if self._refusal:
            return
        self._refusal = self._encoded(problem)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._refuse()
        elif not cycle.more_body:
            # It came behind complete requests, which are answered first.
            return
        elif self.pipeline:
            # It is the body of a request that has not been started, the last in the pipeline.
            self.pipeline.popleft()
            self._unanswered.pop()
        elif cycle.response_started:
            self.transport.close()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._refuse()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        was_last = not self.pipeline
        super().on_response_complete()
        if self._refusal:
            self.flow.pause_reading()
            if was_last:
                self._refuse()

    def _encoded(self, problem: ProblemError) -> bytes:
        answer = problem_response(problem)
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % header for header in headers]
        return b"".join([STATUS_LINE[answer.status_code], *lines, b"\r\n", answer.body])

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._refusal)
            self.transport.close()


def takes_more(scope: Scope) -> bool:
    """Whether what is sent on a request's connection is taken at once, since the client has read what was before."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    return connection is not None and not connection.flow.write_paused


def abort(scope: Scope) -> bool:
    """Aborts the connection that a request came over; False under a server whose connections are not ours."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        connection.abort()
    return connection is not None
