"""HTTP connections: uvicorn's protocol, bounded, with large bodies received in place and problem documents for what is
not HTTP.

uvicorn's protocol parses the head of a request. If the body is large, reading then pauses: the body waits in the
kernel, and so does its sender, until the application gives memory for it (`inlet`). Small bodies, and those of unknown
length, are read by uvicorn.

Behind a head that is refused nothing is read as a request any more (`head`).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from math import inf
from typing import Any

import httptools
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from freestep.errors import MalformedRequest, RequestTimeout
from freestep_service.domain.certificates import Certificate
from freestep_service.web.body import SLOWEST
from freestep_service.web.head import Bounds, Head, Refused, too_large, too_many
from freestep_service.web.inlet import INLET, Inlet
from freestep_service.web.places import Place, plain_host
from freestep_service.web.problems import problem_response
from freestep_service.web.refusals import encoded
from freestep_service.web.stalls import Stall

__all__ = ["CONNECTION", "HEAD_ONLY", "Connection", "abort", "may_stall", "takes_more", "wants_head_only"]

logger = logging.getLogger("freestep")

CONNECTION = "freestep.connection"
"""The ASGI extension of every request: the Connection that it came over."""
HEAD_ONLY = "freestep.head-only"
"""The ASGI extension of a request whose method was HEAD."""
_CLOSE_NOTIFY_S = 0.05
"""Seconds within which our own close_notify has been sent."""
_DEFAULT = Bounds()
_LINGER_S = 2.0
"""Seconds for which a peer is heard out that has been refused: one that is cut off may never see its answer."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with an Inlet for large bodies; the application can abort it, and be notified of its end.

    place: given back when the connection ends; None counts none.
    """

    is_stopping = False
    """Whether the server is shutting down."""
    is_half_closed = False
    """Whether the peer has ended its side, and may still read answers."""
    _last: bytes | None = None
    """What is sent behind the answers to the requests that have come, before the connection ends; None reads on."""
    _is_deaf = False
    """Whether what comes is thrown away."""
    _is_ending = False
    """Whether the last byte has been written."""
    _in_body = False
    """Whether a head has come, and its body has not."""
    _head_size = 0
    """Bytes received since the last end of a head or piece of a body."""
    _timer: asyncio.TimerHandle | None = None
    """Ends the connection unless what the peer may take its time for comes before."""
    _is_timing_head = False
    """Whether that is a head."""
    _length = 0
    """The Content-Length of the newest request."""
    _rest_until = 0.0
    """When the rest of a body that was answered without it has to have come, by the event loop's clock."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        bounds: Bounds = _DEFAULT,
        place: Place | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self._place = place
        self._application, self.app = self.app, self._run
        self.parser = self._new_parser()
        self._extensions: dict[str, Any] = {CONNECTION: self}
        self._unanswered: deque[RequestResponseCycle] = deque()
        """The request that is being answered, and those behind it: of these, uvicorn's protocol knows the last one."""
        self._watchers: dict[Callable[[], None], bool] = {}
        """What to call when the connection ends, and whether for its peer's side or the server's shutdown too."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is not None:
            host, port = self.client
            self.client = plain_host(host), port
        self._outlet: Any = _Outlet(transport, self._finish)
        self.stall = Stall(transport, self._bounds.stall_seconds, self.abort)
        if self._place is not None:
            self._place.end = self._end_soon
        self._allow(self._bounds.idle_seconds, self._close)

    @cached_property
    def certificate(self) -> Certificate | None:
        """The peer's certificate, if it has shown one: then a CA of the setting `ssl_client_ca` has signed it."""
        tls: ssl.SSLObject | None = self.transport.get_extra_info("ssl_object")
        fields = tls and tls.getpeercert()
        return Certificate.of(fields) if fields else None

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The parser is of no more use, and the head said so.
            return
        except httptools.HttpParserError as error:
            self._refuse_rest(_refusal(error))
            return
        if self._head_size > self._bounds.head_bytes:
            self._refuse_rest(too_large(self._bounds).answer)
        elif self._head_size and not self._in_body and not self._is_timing_head:
            self._is_timing_head = True
            self._allow(self._bounds.head_seconds, self._end_head)

    def on_body(self, body: bytes) -> None:
        self._head_size = 0
        super().on_body(body)
        self.on_rest()

    def on_rest(self) -> None:
        """More of a body has come: of one that was answered without it, the next piece has its time."""
        if not self._unanswered and not self._is_ending:
            self._allow_rest()

    def on_message_complete(self) -> None:
        self._head_size = 0
        self._in_body = False
        super().on_message_complete()
        # What follows the last request of a connection is no head that could be late or too long.
        self._is_deaf = self._is_deaf or not self.cycle.keep_alive
        if not self._unanswered and not self._is_ending:
            # The rest of a body that was answered without it.
            self._allow(self._bounds.idle_seconds, self._close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        # The parser leaves the white space behind a value, which is no part of it (RFC 9110, section 5.5).
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if len(self._unanswered) >= self._bounds.unanswered:
            raise too_many(self._bounds)
        head = Head.read(self.parser, self.url, self.headers, self._head_size, self._bounds)
        self._head_size = 0
        self._in_body = True
        self._length = head.length
        self.url = head.target
        self.expect_100_continue = head.expects
        super().on_headers_complete()
        self._forget_timer()
        if self._place is not None:
            self._place.busy()
        self._unanswered.append(self.cycle)
        self.cycle.transport = self._outlet
        # The oldest uvicorn does not look at Connection.
        self.cycle.keep_alive = self.cycle.keep_alive and self.parser.should_keep_alive()
        # Trailers are no headers (RFC 9110, section 6.5.1): they go where nobody looks.
        self.headers = []
        if head.is_last:
            self.cycle.keep_alive = False
            self._is_deaf = True
        elif head.length > self._bounds.small_bytes:
            self.flow.pause_reading()
            inlet: Any = Inlet(self, head.length, self._take_back, self.on_rest)
            self.scope["extensions"] = {**self._extensions, INLET: inlet}

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # What follows the last request of a connection is thrown away: the answer to that one is still to be read.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _take_back(self) -> None:
        """Parses the next request, behind a body that an Inlet has received."""
        self.flow.pause_reading()
        # The old parser still expects the body.
        self.parser = self._new_parser()
        self.transport.set_protocol(self)
        self.flow.resume_reading()
        self.on_message_complete()

    def _run(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """Runs the application, unless the request was refused before its turn came: such a one does nothing."""
        cycle: RequestResponseCycle = receive.__self__  # type: ignore[attr-defined]
        if cycle.waiting_for_100_continue:
            send = _last_unless_asked(cycle)
        elif scope["http_version"] == "1.0":
            send = _without_chunks(cycle)
        return _nothing() if cycle.disconnected else self._application(scope, receive, send)

    # The peer's time

    def _allow(self, seconds: float, end: Callable[[], None]) -> None:
        """Calls `end` in so many seconds, unless something else is allowed or the timer forgotten before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, end)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._is_timing_head = None, False

    def _end_head(self) -> None:
        if self.flow.read_paused:
            # It may have come: it is read when the requests before it have been answered.
            self._allow(self._bounds.head_seconds, self._end_head)
            return
        seconds = self._bounds.head_seconds
        self._refuse_rest(problem_response(RequestTimeout(f"the head of a request has to come within {seconds:g} s")))

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall.watch(self.loop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stall.forget()
        if not self._unanswered:
            self._be_idle()

    # The end of the connection

    def abort(self, stalled_s: float | None = None) -> None:
        """Ends the connection at once. Nothing that is buffered is sent, nor referred to from here on.

        stalled_s: seconds for which the client has read nothing, if that is why; it is logged once.
        """
        if stalled_s is not None and not self.transport.is_closing():
            scope = (self._unanswered[0] if self._unanswered else self.cycle).scope
            method, path = scope["method"], scope["path"]
            logger.warning("%s %s: aborted, the client read nothing for %g s", method, path, stalled_s)
        self.transport.abort()
        self._disconnect()

    def _disconnect(self) -> None:
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    @contextmanager
    def watched(self, on_end: Callable[[], None], *, or_shutdown: bool) -> Iterator[None]:
        """Calls `on_end` once if the connection ends before the block does.

        or_shutdown: also when the server's shutdown begins, or the peer ends its side: it may be gone.
        """
        if self.transport.is_closing() or (or_shutdown and (self.is_stopping or self.is_half_closed)):
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
        self._unset_keepalive_if_required()
        self._forget_timer()
        self.stall.forget()
        if self._place is not None:
            self._place.leave()
        self._disconnect()
        while self._watchers:
            on_end, _ = self._watchers.popitem()
            on_end()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The peer sends nothing more. Requests that have come as a whole are answered, but waits end.

        TLS has no half of a connection: there, they end with it.
        """
        if self._is_ending or self.scheme == "https":
            return None
        self.is_half_closed = True
        self._stop(b"")
        self._end_waits()
        return not self.transport.is_closing()

    def shutdown(self) -> None:
        end = self._end_closing if self.stall.is_owed() else self.transport.abort
        super().shutdown()
        self.is_stopping = True
        self._end_waits()
        if self.transport.is_closing():
            self._is_ending = self._is_deaf = True
            # TLS would wait for the client's close_notify, which an idle client sends when it next uses the connection.
            self._allow(_CLOSE_NOTIFY_S, end)

    def _end_waits(self) -> None:
        for on_end in [on_end for on_end, or_shutdown in self._watchers.items() if or_shutdown]:
            del self._watchers[on_end]
            on_end()

    def _finish(self) -> None:
        """Sends what is to be last, and ends the connection when the peer does, if it may be sending still."""
        if self._is_ending or self.transport.is_closing():
            return
        self._is_ending = self._is_deaf = True
        self._forget_timer()
        if self._last:
            self.transport.write(self._last)
        may_come_more = (self._last or self._in_body) and not self.is_half_closed
        if may_come_more and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._allow(_LINGER_S, self._close)
        else:
            # TLS hears the peer out by itself.
            self._close()

    def _close(self) -> None:
        """Ends the connection when what was written has been sent: for that, the peer has the time of any answer."""
        self._is_ending = self._is_deaf = True
        self.transport.close()
        self._allow(_LINGER_S, self._end_closing)

    def _end_closing(self) -> None:
        """Aborts a connection that is closing, once the peer has taken what it is owed."""
        if self.stall.is_owed():
            self.stall.watch(self.loop)
            self._allow(_LINGER_S, self._end_closing)
        else:
            self.transport.abort()

    def _end_soon(self) -> None:
        """Ends the connection, whatever is still to be sent: its place is another's, or what it sends is no HTTP."""
        self._is_ending = self._is_deaf = True
        self.transport.close()
        self._allow(_LINGER_S, self.transport.abort)

    # What is not HTTP

    def _refuse_rest(self, answer: Response) -> None:
        """Answers what follows, after the requests before it, and ends the connection."""
        self._stop(encoded(answer, self.server_state.default_headers))

    def _stop(self, last: bytes) -> None:
        """Reads no more requests; `last` follows the answers to those that have come as a whole."""
        self.flow.pause_reading()
        if self._last is not None:
            return
        self._last, self._is_deaf = last, True
        self._forget_timer()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._finish()
        elif not cycle.more_body:
            # It came behind complete requests, which are answered first.
            return
        elif self.pipeline:
            # It is the body of a request that has not been started, the last in the pipeline.
            self.pipeline.popleft()
            self._unanswered.pop()
        elif cycle.response_started:
            self._end_soon()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._finish()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        if self._is_ending:
            self.server_state.total_requests += 1
            return
        was_last = not self.pipeline
        super().on_response_complete()
        if self._last is not None:
            self.flow.pause_reading()
            if was_last:
                self._finish()
        elif was_last and not self.transport.is_closing():
            self._rest()

    def _rest(self) -> None:
        """There is no request to be answered. The body of one that was may still be coming."""
        if not self.flow.write_paused:
            self._be_idle()
        if self._in_body:
            self._unset_keepalive_if_required()
            self._rest_until = self.loop.time() + self._bounds.idle_seconds + self._length / SLOWEST
            self._allow_rest()

    def _allow_rest(self) -> None:
        left = self._rest_until - self.loop.time()
        self._allow(max(0.0, min(self._bounds.idle_seconds, left)), self._close)

    def _be_idle(self) -> None:
        """All requests were answered, and the peer has taken the answers, but for what a transport buffers."""
        # What was sent may be of another client's than what comes next: behind a proxy, they share connections.
        self.stall.seconds = self._bounds.stall_seconds
        if self._place is not None and not self._is_ending:
            self._place.idle()


class _Outlet:
    """A transport as the answer to a request sees it: closing it ends the connection in order."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


def _refusal(error: httptools.HttpParserError) -> Response:
    """The answer to what a parser, or a callback of its, has refused."""
    if isinstance(error.__context__, Refused):
        return error.__context__.answer
    return problem_response(MalformedRequest(f"what was sent cannot be read as HTTP: {error}"))


async def _nothing() -> None:
    pass


def _last_unless_asked(cycle: RequestResponseCycle) -> Send:
    """Sends the answer to a request whose client waits to be asked for the body.

    If it never was, the answer is the connection's last: what follows may be the body or another request, and nobody
    could say which (RFC 9110, section 10.1.1).
    """

    async def send(message: Message) -> None:
        if cycle.waiting_for_100_continue:
            cycle.keep_alive = False
        await cycle.send(message)  # type: ignore[arg-type]

    return send


def _without_chunks(cycle: RequestResponseCycle) -> Send:
    """Sends the answer to a request of HTTP/1.0, which knows no chunks (RFC 9112, section 6.1): where its length is not
    known, it ends with the connection."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            if not any(name == b"content-length" for name, _ in message["headers"]):
                cycle.chunked_encoding, cycle.expected_content_length = False, inf  # type: ignore[assignment]
        elif cycle.expected_content_length == inf and not message.get("more_body"):
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)  # type: ignore[arg-type]

    return send


def takes_more(scope: Scope) -> bool:
    """Whether what is sent on a request's connection is taken at once, since the client has read what was before."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    return connection is not None and not connection.flow.write_paused


def may_stall(scope: Scope, seconds: float) -> None:
    """Lets the client of a request read nothing of the answer for longer than others may."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        connection.stall.seconds = seconds


def abort(scope: Scope, stalled_s: float | None = None) -> bool:
    """Aborts the connection that a request came over; False under a server whose connections are not ours.

    stalled_s: as of `Connection.abort`.
    """
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        connection.abort(stalled_s)
    return connection is not None


def wants_head_only(scope: Scope) -> bool:
    """Whether the server sends no body of the answer."""
    return HEAD_ONLY in scope.get("extensions", {})
