"""One HTTP/1.1 request and its answer over one connection, with bodies that are not copied.

Large bodies go between memory and socket directly; all else is `http_messages`. A wait for the other side is one wait
after another, so that signals are noticed which came just before it.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil, inf
from typing import TypeAlias, TypeVar

import httpx

from freestep.http_messages import AnswerReader, framed, request_head
from freestep.threads import LOOK_S
from freestep.wire.receiver import Sink, lay

__all__ = ["Body", "Exchange", "poll_socket"]

_HEAD = 4 * 1024
"""Bytes to read while a head may come: what comes of the body with it is copied."""
_CHUNK = 64 * 1024
_GATHERED = 64 * 1024
"""Bytes that are gathered before they are sent, so that the head goes with a body that is shorter."""
_TLS_WRITE = 1024 * 1024
"""Bytes given to TLS at a time: an early answer is looked for in between."""
_MOST_PIECES = 512
"""Most pieces in one sendmsg: Linux and macOS accept 1024."""
_PIECE = 256 * 1024
"""Bytes given to other transports at a time: httpx's copies the rest of a piece after every partial write."""

_Bytes: TypeAlias = bytes | memoryview
T = TypeVar("T")
R = TypeVar("R")


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
        self._looks = inf
        """Waits of which the timeout for reading is made."""
        self._end = end
        self._answer = AnswerReader("")
        self._is_sent = False
        self._is_read = False
        """Whether all of the body has been handed on."""
        self._is_closed = False

    def begin(self, request: httpx.Request) -> AnswerReader:
        """Sends the request and returns its answer once that has a head, perhaps before all of the request is sent."""
        self._answer = answer = AnswerReader(request.method)
        self._is_sent = self._send(request)
        timeout = self._timeouts.get("read")
        self._looks = inf if timeout is None else max(1, ceil(timeout / LOOK_S))
        self._socket.settimeout(LOOK_S if timeout is None else timeout / self._looks)
        while not answer.has_head:
            self._feed(_HEAD)
        return answer

    # The request

    def _send(self, request: httpx.Request) -> bool:
        """Sends the request; False if the server answered or closed the connection before it had all of it."""
        headers, stream = request.headers.raw, request.stream
        assert isinstance(stream, httpx.SyncByteStream)
        gathered: list[_Bytes] = [request_head(request.method.encode("ascii"), request.url.raw_path, headers)]
        size = len(gathered[0])
        if isinstance(stream, Body) and stream.length >= _GATHERED:
            # The service reads it while the body is on its way.
            if not self._write(gathered):
                return False
            size = 0
        for piece in framed(stream.pieces if isinstance(stream, Body) else stream, headers):
            gathered.append(piece)
            size += len(piece)
            if size >= _GATHERED or len(gathered) >= _MOST_PIECES:
                if not self._write(gathered):
                    return False
                gathered, size = [], 0
        return self._write(gathered)

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
        if data:
            self._answer.feed(data)
        return bool(data) and not self._answer.has_head

    # The answer

    def _feed(self, most: int) -> None:
        """Reads more of the answer, or its end."""
        data = self._received(self._socket.recv, most)
        if data:
            self._answer.feed(data)
        else:
            self._answer.end()

    def _received(self, receive: Callable[[T], R], where: T) -> R:
        """Waits for data by a call of the socket's, which is repeated after each part of the timeout."""
        looks = self._looks
        while True:
            try:
                return receive(where)
            except TimeoutError as error:
                looks -= 1
                if looks <= 0:
                    raise httpx.ReadTimeout(f"the server sent no data for {self._timeouts.get('read')} s") from error
            except OSError as error:
                raise httpx.ReadError(str(error)) from error

    def __iter__(self) -> Iterator[bytes]:
        answer = self._answer
        yield from answer.take()
        while not answer.is_complete:
            self._feed(_CHUNK)
            yield from answer.take()
        self._is_read = True

    def pour(self, sink: Sink) -> None:
        """Receives the body into a sink, from the socket directly; as `freestep.bulk.pour`."""
        answer = self._answer
        if answer.missing is None:
            for chunk in self:
                lay(sink, chunk)
            return
        for piece in answer.take():
            lay(sink, memoryview(piece))
        while missing := answer.missing:
            size = self._received(self._socket.recv_into, sink.get_buffer()[:missing])
            if not size:
                answer.end()
            sink.buffer_updated(size)
            answer.received(size)
        self._is_read = True

    def close(self) -> None:
        """Ends the exchange; the connection is kept if both messages are complete and neither side is closing."""
        if self._is_closed:
            return
        self._is_closed = True
        answer = self._answer
        self._end(self._is_sent and answer.is_complete and self._is_read and not answer.is_last)


def poll_socket(connected: socket.socket, events: int, timeout: float | None) -> int:
    """The events of a socket, waiting at most `timeout` seconds for one of these; 0 if there are none."""
    poll, left = select.poll(), inf if timeout is None else timeout
    poll.register(connected, events)
    while not (found := poll.poll(1e3 * min(left, LOOK_S))):
        left -= LOOK_S
        if left <= 0:
            return 0
    return found[0][1]


def _drop(pieces: list[_Bytes], size: int) -> None:
    """Removes the first `size` bytes."""
    while pieces and size >= len(pieces[0]):
        size -= len(pieces.pop(0))
    if size:
        pieces[0] = memoryview(pieces[0])[size:]
