"""An httpx transport for large bodies, which neither copies nor splits them.

An `httpx.Client` over a `BulkTransport` works as any other: authentication, hooks, redirects, cookies, timeouts and
errors are httpx's. A `bulk_exchange.Body` is sent from the memory that it is in, and `pour` receives an answer into the
memory where it belongs. Both also work over other transports, such as one to a proxy, at those transports' speed.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, TypeAlias

import httpx

from freestep.bulk_exchange import Exchange, poll_socket
from freestep.forks import ForkLock
from freestep.threads import stop_by
from freestep.wire.receiver import Sink, lay

__all__ = ["BulkTransport", "pour"]

_EXCHANGE = "freestep.exchange"
"""The response extension that contains the Exchange."""
_PORTS = {"http": 80, "https": 443}
_LIMITS = httpx.Limits(max_keepalive_connections=20, keepalive_expiry=5.0)

_Origin: TypeAlias = tuple[str, str, int]


def pour(response: httpx.Response, sink: Sink) -> None:
    """Receives the body of a streamed response into a sink, which must have room for all of it.

    Raises what the sink raises, MalformedTensors if the sink has no room, and httpx's TransportErrors.
    """
    exchange = response.extensions.get(_EXCHANGE)
    if isinstance(exchange, Exchange) and not response.is_stream_consumed:
        exchange.pour(sink)
    else:
        for chunk in response.iter_bytes():
            lay(sink, chunk)


class BulkTransport(httpx.BaseTransport):
    """Direct connections to http and https URLs, kept open between requests.

    Safe to use from several threads. Requests raise httpx's TransportErrors, as with httpx's own transport.

    Args:
        verify: As for `httpx.HTTPTransport`.
        cert: As for `httpx.HTTPTransport`.
        trust_env: As for `httpx.HTTPTransport`.
        limits: How many idle connections are kept, and for how long; connections in use are not limited.
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
        self._lock = ForkLock()
        self._idle: list[_Connection] = []
        """Ordered by when they were last used."""
        self._is_closed = False
        self._process = os.getpid()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; called by httpx.

        Args:
            request: The request; its stream may be a `bulk_exchange.Body`.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
        url = request.url
        if url.scheme not in _PORTS:
            protocol = f"has an unsupported protocol '{url.scheme}://'" if url.scheme else "is missing its protocol"
            raise httpx.UnsupportedProtocol(f"Request URL {protocol}.")
        origin = (url.scheme, url.raw_host.decode("ascii"), _PORTS[url.scheme] if url.port is None else url.port)
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        connection = self._take(origin) or self._connect(origin, timeouts.get("connect"))
        exchange = Exchange(connection.socket, timeouts, partial(self._end, connection))
        try:
            stop_by(connection.break_off)
            answer = exchange.begin(request)
        except BaseException as error:
            exchange.close()
            if isinstance(error, httpx.TransportError):
                # What has broken this connection, such as a peer that is gone, may have broken others unseen.
                self._forget(origin)
            raise
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=exchange,
            extensions={
                "http_version": b"HTTP/" + answer.version,
                "reason_phrase": answer.reason,
                _EXCHANGE: exchange,
            },
        )

    def close(self) -> None:
        """Closes the idle connections, and those in use when their requests have ended."""
        with self._lock.held:
            self._is_closed = True
            idle = self._idle.copy()
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _leave_to_parent(self) -> None:
        """After a fork: the parent goes on using the connections."""
        idle, self._idle, self._process = self._idle, [], os.getpid()
        for connection in idle:
            connection.close()

    def _take(self, origin: _Origin) -> _Connection | None:
        """An idle connection that is still open, as far as can be seen."""
        while True:
            with self._lock.held:
                found = next((each for each in reversed(self._idle) if each.origin == origin), None)
                if found is None:
                    return None
                self._idle.remove(found)
            if not found.is_stale(time.monotonic() - self._longest_idle_s):
                return found
            found.close()

    def _forget(self, origin: _Origin) -> None:
        """Closes the idle connections to a server."""
        with self._lock.held:
            forgotten = [each for each in self._idle if each.origin == origin]
            self._idle = [each for each in self._idle if each.origin != origin]
        for connection in forgotten:
            connection.close()

    def _end(self, connection: _Connection, is_reusable: bool) -> None:
        stop_by(None)
        if not is_reusable:
            connection.close()
            return
        excess = []
        with self._lock.held:
            idle = self._idle
            connection.idle_since = now = time.monotonic()
            idle.append(connection)
            while idle and (
                self._is_closed or len(idle) > self._most_idle or idle[0].idle_since < now - self._longest_idle_s
            ):
                excess.append(idle.pop(0))
        for each in excess:
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
            raise httpx.ConnectTimeout(f"no connection to {host}:{port} within {timeout} s") from error
        except (OSError, UnicodeError, OverflowError) as error:
            # The last two are of a name that cannot be a host's, and of a port above 65535.
            raise httpx.ConnectError(str(error)) from error
        return _Connection(origin, connected)


class _Connection:
    """A connection, and since when it has been idle (monotonic seconds)."""

    def __init__(self, origin: _Origin, connected: socket.socket) -> None:
        self.origin = origin
        self.socket = connected
        self.idle_since = 0.0

    def is_stale(self, oldest: float) -> bool:
        """True if it has been idle since before `oldest`, or is readable: an idle connection is when it was closed.

        What is left of a longer answer may have been decrypted already.
        """
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return True
        return self.idle_since < oldest or bool(poll_socket(self.socket, select.POLLIN, 0.0))

    def break_off(self) -> None:
        """Ends what another thread sends and receives over it; what that has sent is on its way."""
        with suppress(OSError):
            # TLS has a shutdown of its own, for the thread that uses it.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


def _limit(limit: float | None) -> float:
    return inf if limit is None else limit
