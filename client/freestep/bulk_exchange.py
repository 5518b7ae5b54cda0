"""One HTTP/1.1 request and its answer over one connection, with bodies that are not copied.

h11 makes and reads everything but large bodies (RFC 9112); these go between memory and socket directly.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import h11
import httpx

from freestep.wire.receiver import Sink, lay

__all__ = ["Body", "Exchange", "poll_socket"]

_HEAD = 4 * 1024
"""Bytes to read while a head may come: what comes of the body with it is copied."""
_CHUNK = 64 * 1024
_GATHERED = 64 * 1024
"""Bytes that are gathered before they are sent, so that the head goes with the beginning of the body."""
_TLS_WRITE = 1024 * 1024
"""Bytes given to TLS at a time: an early answer is looked for in between."""
_MOST_PIECES = 512
"""Most pieces in one sendmsg: Linux and macOS accept 1024."""
_PIECE = 256 * 1024
"""Bytes given to other transports at a time: httpx's copies the rest of a piece after every partial write."""
_LONGEST_HEAD = 100 * 1024
"""As httpx's own limit."""

_Bytes: TypeAlias = bytes | memoryview


class Body(httpx.SyncByteStream):
    """A request body in memory, as views of bytes; it can be sent any number of times.

    Set it as the request's `stream`, since httpx wraps what it is given as `content`.
    """

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self.length = sum(map(len, pieces))

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            for begin in range(0, len(piece), _PIECE):
                # h11 and sockets accept a memoryview; the annotation is httpx's.
                yield piece[begin : begin + _PIECE]  # type: ignore[misc]


class Exchange(httpx.SyncByteStream):
    """A request and its answer over one connection; iterating over it yields the answer's body.

    connected: the connection. timeouts: httpx's, in seconds, for `read` and `write`. end: called once, with whether the
    connection can be used for another request.
    """

    def __init__(
        self, connected: socket.socket, timeouts: Mapping[str, float | None], end: Callable[[bool], None]
    ) -> None:
        self._socket = connected
        self._timeouts = timeouts
        self._end = end
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._method = b""
        self._is_sent = False
        self._head: h11.Response | None = None
        self._is_poured = False
        self._is_closed = False

    def begin(self, request: httpx.Request) -> h11.Response:
        """Sends the request and returns the head of its answer, which may come before all of the request is sent."""
        try:
            self._is_sent = self._send(request)
            self._socket.settimeout(self._timeouts.get("read"))
            while self._head is None and not self._read_head():
                if not (data := self._receive(_HEAD)):
                    raise httpx.RemoteProtocolError("the server closed the connection without an answer")
                self._h11.receive_data(data)
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        assert self._head is not None
        return self._head

    # The request

    def _send(self, request: httpx.Request) -> bool:
        """Sends the request; False if the server answered or closed the connection before it had all of it."""
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        self._method = head.method
        stream = request.stream
        assert isinstance(stream, httpx.SyncByteStream)
        # In one piece: with passthrough, h11 makes a piece of every header line.
        gathered: list[_Bytes] = [self._h11.send(head) or b""]
        for piece in stream.pieces if isinstance(stream, Body) else stream:
            gathered += self._h11.send_with_data_passthrough(h11.Data(data=piece)) or ()  # type: ignore[arg-type]
            if sum(map(len, gathered)) >= _GATHERED or len(gathered) >= _MOST_PIECES:
                if not self._write(gathered):
                    return False
                gathered = []
        return self._write([*gathered, *(self._h11.send_with_data_passthrough(h11.EndOfMessage()) or ())])

    def _write(self, pieces: list[_Bytes]) -> bool:
        """Writes the pieces; False if the server answered or closed the connection meanwhile.

        A client should watch for such an answer and stop sending (RFC 9112 section 9.5).
        """
        timeout = self._timeouts.get("write")
        try:
            self._socket.setblocking(False)
            while pieces:
                with suppress(BlockingIOError, ssl.SSLWantWriteError):
                    _drop(pieces, self._send_some(pieces))
                if pieces:
                    events = poll_socket(self._socket, select.POLLIN | select.POLLOUT, timeout)
                    if not events:
                        raise TimeoutError
                    if events & select.POLLIN and not self._read_early():
                        return False
            return True
        except TimeoutError as error:
            raise httpx.WriteTimeout(f"the server accepted no data for {timeout} s") from error
        except OSError:
            # The server closed the connection; an answer that it sent before can still be read.
            return False

    def _send_some(self, pieces: list[_Bytes]) -> int:
        """Sends as much as the socket accepts; returns how many bytes."""
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.send(memoryview(pieces[0])[:_TLS_WRITE])
        return self._socket.sendmsg(pieces)

    def _read_early(self) -> bool:
        """Reads what the server sends during the request; False if it answered or closed the connection."""
        try:
            data = self._socket.recv(_HEAD)
        except ssl.SSLWantReadError:
            # TLS's own data, such as a session ticket.
            return True
        self._h11.receive_data(data)
        return bool(data) and not self._read_head()

    # The answer

    def _read_head(self) -> bool:
        """True once the head of the answer has been read."""
        while (event := self._next()) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                self._head = event
                return True
            if not isinstance(event, h11.InformationalResponse):
                raise httpx.RemoteProtocolError("the server changed to another protocol")
        return False

    def _next(self) -> Any:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    def _receive(self, most: int) -> bytes:
        with self._reading():
            return self._socket.recv(most)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"the server sent no data for {self._timeouts.get('read')} s") from error
        except OSError as error:
            raise httpx.ReadError(str(error)) from error

    def __iter__(self) -> Iterator[bytes]:
        while isinstance(event := self._next(), h11.Data) or event is h11.NEED_DATA:
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                self._h11.receive_data(self._receive(_CHUNK))

    def pour(self, sink: Sink) -> None:
        """Receives the body into a sink, from the socket directly; as `freestep.bulk.pour`."""
        length = self._length()
        if length is None:
            for chunk in self:
                lay(sink, chunk)
            return
        # The rest of the body bypasses h11, whose state therefore stays at the body's beginning.
        early, _ = self._h11.trailing_data
        lay(sink, memoryview(early)[:length])
        missing = length - len(early)
        with self._reading():
            while missing > 0:
                size = self._socket.recv_into(sink.get_buffer()[:missing])
                if not size:
                    raise httpx.RemoteProtocolError("the body ended before its Content-Length")
                sink.buffer_updated(size)
                missing -= size
        self._is_poured = missing == 0

    def _length(self) -> int | None:
        """The body's length, if Content-Length alone determines it (RFC 9112 section 6.3)."""
        assert self._head is not None
        headers = dict(self._head.headers)
        if self._method == b"HEAD" or self._head.status_code in (204, 304) or b"transfer-encoding" in headers:
            return None
        return int(headers[b"content-length"]) if b"content-length" in headers else None

    def close(self) -> None:
        """Ends the exchange; the connection is kept if both messages are complete and neither side is closing."""
        if self._is_closed:
            return
        self._is_closed = True
        is_received = self._is_poured or (self._h11.their_state is h11.DONE and not self._h11.trailing_data[0])
        self._end(self._is_sent and is_received and self._h11.our_state is h11.DONE)


def poll_socket(connected: socket.socket, events: int, timeout: float | None) -> int:
    """The events of a socket, waiting at most `timeout` seconds for one of these; 0 if there are none."""
    poll = select.poll()
    poll.register(connected, events)
    return next((found for _, found in poll.poll(None if timeout is None else 1e3 * timeout)), 0)


def _drop(pieces: list[_Bytes], size: int) -> None:
    """Removes the first `size` bytes."""
    while pieces and size >= len(pieces[0]):
        size -= len(pieces.pop(0))
    if size:
        pieces[0] = memoryview(pieces[0])[size:]
