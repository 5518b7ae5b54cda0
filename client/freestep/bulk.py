"""Large bodies between memory and a socket, under httpx: a transport that neither copies nor cuts them.

An `httpx.Client` over a `BulkTransport` is one as any other: its authentication, hooks, redirects, cookies, timeouts
and errors are httpx's. What differs is below. A `Body` is sent from where it lies, and `pour` lets the socket fill the
memory where an answer belongs. HTTP/1.1 (RFC 9112) is h11's affair, which httpx uses too; only the bytes of bodies go
past it.

Over another transport, one to a proxy say, both work as well, at the speed of that.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from math import inf
from typing import Any, TypeAlias
from urllib.request import getproxies

import h11
import httpx

from freestep.wire.receiver import Sink, lay

__all__ = ["Body", "BulkTransport", "direct_mounts", "pour"]

_EXCHANGE = "freestep.exchange"
"""The extension of an answer that came over a BulkTransport: its _Exchange."""
_PORTS = {"http": 80, "https": 443}
_HEAD = 4 * 1024
"""Bytes to ask for while a head may come: what comes of the body with it is copied."""
_CHUNK = 64 * 1024
_TOGETHER = 64 * 1024
"""Bytes that are gathered before they are sent: the head goes with the beginning of the body."""
_RECORDS = 1024 * 1024
"""Bytes handed to TLS at a time: between them an early answer is looked for."""
_MOST_PIECES = 512
"""Pieces that are gathered at most: Linux and macOS send up to 1024 in one call."""
_PIECE = 256 * 1024
"""Bytes handed to other transports at a time: httpx's copies what is left of a piece after every partial write."""
_LONGEST_HEAD = 100 * 1024
"""As long a head as httpx takes."""

_Bytes: TypeAlias = bytes | memoryview
_Origin: TypeAlias = tuple[str, str, int]


_LIMITS = httpx.Limits(max_keepalive_connections=20, keepalive_expiry=5.0)


class Body(httpx.SyncByteStream):
    """A request's body that lies in memory, in pieces that are views of bytes. It can be sent any number of times.

    It is put in place as a request's `stream`, since httpx wraps what it is given as `content`.
    """

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self.length = sum(map(len, pieces))

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            for begin in range(0, len(piece), _PIECE):
                # A memoryview is what h11 and the socket are content with; the annotation is httpx's.
                yield piece[begin : begin + _PIECE]  # type: ignore[misc]


def pour(response: httpx.Response, sink: Sink) -> None:
    """The receive-into-buffer call: puts the body of a streamed answer into a sink, which has room for it.

    Raises what the sink raises, MalformedTensors when the sink has no room, and httpx's TransportErrors.
    """
    exchange = response.extensions.get(_EXCHANGE)
    if isinstance(exchange, _Exchange) and not response.is_stream_consumed:
        exchange.pour(sink)
    else:
        for chunk in response.iter_bytes():
            lay(sink, chunk)


def direct_mounts(transport: httpx.BaseTransport) -> dict[str, httpx.BaseTransport]:
    """The `mounts` of an `httpx.Client` that have a transport in use wherever the environment names no proxy.

    Which proxy is used for what else is left to httpx, as it is when a transport is not given.
    """
    proxies = getproxies()
    exempt = [host for each in proxies.get("no", "").split(",") if (host := each.strip())]
    patterns = [f"all://{_pattern(host)}" if "://" not in host else host for host in exempt if host != "*"]
    if "all" not in proxies or "*" in exempt:
        patterns.append("all://")
    return dict.fromkeys(patterns, transport)


def _pattern(host: str) -> str:
    """A host in NO_PROXY as httpx reads it: a name stands for those below it too."""
    try:
        address = ip_address(host.partition("/")[0])
    except ValueError:
        return host if host.lower() == "localhost" else f"*{host}"
    return f"[{host}]" if address.version == 6 else host


class BulkTransport(httpx.BaseTransport):
    """Direct connections to http and https URLs, kept open between requests. Safe to use from several threads.

    verify, cert, trust_env, limits: as for `httpx.HTTPTransport`, but there is no limit to connections in use.

    Requests raise httpx's TransportErrors, as those over httpx's own transport do.
    """

    def __init__(
        self,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        *,
        limits: httpx.Limits = _LIMITS,
    ) -> None:
        self._context = httpx.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
        self._context.set_alpn_protocols(["http/1.1"])
        self._most_idle = _limit(limits.max_keepalive_connections)
        self._longest_idle_s = _limit(limits.keepalive_expiry)
        self._changing = threading.Lock()
        self._idle: list[_Connection] = []
        """The one that was used last is at the end."""
        self._is_closed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in _PORTS:
            protocol = f"has an unsupported protocol '{url.scheme}://'" if url.scheme else "is missing its protocol"
            raise httpx.UnsupportedProtocol(f"Request URL {protocol}.")
        origin = (url.scheme, url.raw_host.decode("ascii"), _PORTS[url.scheme] if url.port is None else url.port)
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        connection = self._take(origin) or self._connect(origin, timeouts.get("connect"))
        exchange = _Exchange(self, connection, timeouts)
        try:
            head = exchange.begin(request)
        except BaseException:
            exchange.close()
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=exchange,
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "reason_phrase": head.reason,
                _EXCHANGE: exchange,
            },
        )

    def close(self) -> None:
        with self._changing:
            self._is_closed = True
            idle = self._idle.copy()
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _take(self, origin: _Origin) -> _Connection | None:
        """An idle connection that is good, as far as can be seen."""
        while True:
            with self._changing:
                found = next((each for each in reversed(self._idle) if each.origin == origin), None)
                if found is None:
                    return None
                self._idle.remove(found)
            if not found.is_stale(time.monotonic() - self._longest_idle_s):
                return found
            found.close()

    def give_back(self, connection: _Connection) -> None:
        """Keeps a connection for other requests."""
        idle, over = self._idle, []
        with self._changing:
            connection.idle_since = now = time.monotonic()
            idle.append(connection)
            while idle and (
                self._is_closed or len(idle) > self._most_idle or idle[0].idle_since < now - self._longest_idle_s
            ):
                over.append(idle.pop(0))
        for each in over:
            each.close()

    def _connect(self, origin: _Origin, timeout: float | None) -> _Connection:
        scheme, host, port = origin
        try:
            connected = socket.create_connection((host, port), timeout)
            try:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if scheme == "https":
                    connected = self._context.wrap_socket(connected, server_hostname=host)
            except BaseException:
                connected.close()
                raise
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"{host}:{port} was not connected to within {timeout} s") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return _Connection(origin, connected)


class _Connection:
    """A connection, and since when it has been idle."""

    def __init__(self, origin: _Origin, connected: socket.socket) -> None:
        self.origin = origin
        self.socket = connected
        self.idle_since = 0.0

    def is_stale(self, oldest: float) -> bool:
        """Whether it has been idle since before `oldest`, or the server has closed it, of which an idle one hears."""
        return self.idle_since < oldest or bool(_poll(self.socket, select.POLLIN, 0.0))

    def close(self) -> None:
        self.socket.close()


class _Exchange(httpx.SyncByteStream):
    """A request and its answer over one connection; what it yields is the answer's body.

    h11 makes and reads all but the bodies that go past it, so its own account of a poured one stays unfinished.
    """

    def __init__(self, transport: BulkTransport, connection: _Connection, timeouts: Mapping[str, float | None]) -> None:
        self._transport = transport
        self._connection = connection
        self._socket = connection.socket
        self._timeouts = timeouts
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
            while self._head is None and not self._is_answered():
                if not (data := self._receive(_HEAD)):
                    raise httpx.RemoteProtocolError("the server closed the connection without an answer")
                self._h11.receive_data(data)
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        assert self._head is not None
        return self._head

    # The request

    def _send(self, request: httpx.Request) -> bool:
        """Whether all of the request was sent: the server may answer, or close the connection, before it has it."""
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        self._method = head.method
        stream = request.stream
        assert isinstance(stream, httpx.SyncByteStream)
        # Joined, since h11 makes a piece of every line.
        gathered: list[_Bytes] = [self._h11.send(head) or b""]
        for piece in stream.pieces if isinstance(stream, Body) else stream:
            gathered += self._h11.send_with_data_passthrough(h11.Data(data=piece)) or ()  # type: ignore[arg-type]
            if sum(map(len, gathered)) >= _TOGETHER or len(gathered) >= _MOST_PIECES:
                if not self._write(gathered):
                    return False
                gathered = []
        return self._write([*gathered, *(self._h11.send_with_data_passthrough(h11.EndOfMessage()) or ())])

    def _write(self, pieces: list[_Bytes]) -> bool:
        """Whether all of it was sent: the server may answer, or close the connection, while there is something left.

        RFC 9112 section 9.5 has a client look for such an answer, and send no more.
        """
        timeout = self._timeouts.get("write")
        try:
            self._socket.setblocking(False)
            while pieces:
                with suppress(BlockingIOError, ssl.SSLWantWriteError):
                    _forget(pieces, self._send_some(pieces))
                if pieces:
                    events = _poll(self._socket, select.POLLIN | select.POLLOUT, timeout)
                    if not events:
                        raise TimeoutError
                    if events & select.POLLIN and not self._listen():
                        return False
            return True
        except TimeoutError as error:
            raise httpx.WriteTimeout(f"the server took nothing for {timeout} s") from error
        except OSError:
            # It has closed the connection. If it has answered before, that can be read.
            return False

    def _send_some(self, pieces: list[_Bytes]) -> int:
        """How many bytes of the pieces the socket has taken."""
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.send(memoryview(pieces[0])[:_RECORDS])
        return self._socket.sendmsg(pieces)

    def _listen(self) -> bool:
        """Takes what the server says meanwhile; whether it may be sent more."""
        try:
            data = self._socket.recv(_HEAD)
        except ssl.SSLWantReadError:
            # It was of TLS itself, a session ticket say.
            return True
        self._h11.receive_data(data)
        return bool(data) and not self._is_answered()

    # The answer

    def _is_answered(self) -> bool:
        """Whether the head of the answer is there."""
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
            raise httpx.ReadTimeout(f"nothing came for {self._timeouts.get('read')} s") from error
        except OSError as error:
            raise httpx.ReadError(str(error)) from error

    def __iter__(self) -> Iterator[bytes]:
        while isinstance(event := self._next(), h11.Data) or event is h11.NEED_DATA:
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                self._h11.receive_data(self._receive(_CHUNK))

    def pour(self, sink: Sink) -> None:
        """As the function of this name."""
        length = self._length()
        if length is None:
            for chunk in self:
                lay(sink, chunk)
            return
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
        """How long the body is, where Content-Length alone says it: RFC 9112 section 6.3."""
        assert self._head is not None
        headers = dict(self._head.headers)
        if self._method == b"HEAD" or self._head.status_code in (204, 304) or b"transfer-encoding" in headers:
            return None
        return int(headers[b"content-length"]) if b"content-length" in headers else None

    def close(self) -> None:
        """Keeps the connection for other requests, if both sides have said everything and will say more."""
        if self._is_closed:
            return
        self._is_closed = True
        is_received = self._is_poured or (self._h11.their_state is h11.DONE and not self._h11.trailing_data[0])
        if self._is_sent and is_received and self._h11.our_state is h11.DONE:
            self._transport.give_back(self._connection)
        else:
            self._connection.close()


def _limit(limit: float | None) -> float:
    return inf if limit is None else limit


def _poll(connected: socket.socket, events: int, timeout: float | None) -> int:
    """Which of some events there are, or come within `timeout` seconds."""
    poll = select.poll()
    poll.register(connected, events)
    return next((what for _, what in poll.poll(None if timeout is None else 1e3 * timeout)), 0)


def _forget(pieces: list[_Bytes], size: int) -> None:
    """Drops the first `size` bytes."""
    while pieces and size >= len(pieces[0]):
        size -= len(pieces.pop(0))
    if size:
        pieces[0] = memoryview(pieces[0])[size:]
