"""Servers that respond byte by byte by a script, and requests to them through the transport of large bodies.

Closing a server raises what failed in its scripts.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Any

import httpx

from freestep.bulk import pour
from freestep.bulk_exchange import Body
from meanwhile import DEADLINE_S, end, wait_for

__all__ = ["ANSWERS", "LARGE", "Peer", "Script", "Server", "Sink", "assert_", "post", "poured"]

LARGE = bytes(range(256)) * 256 * 1024
"""64 MB, more than any socket's buffers hold."""

ANSWERS = {
    "length": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
    "chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n",
    "close": "HTTP/1.1 200 OK\r\n\r\n0123456789",
    "1.0": "HTTP/1.0 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
    "interim": "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
}
"""The same body, by the way in which its end is marked."""


class Peer:
    """A server's end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def head(self) -> str:
        """Reads the head of a request, and nothing after it."""
        read = b""
        while not read.endswith(b"\r\n\r\n"):
            byte = self.connection.recv(1)
            assert byte, "the connection ended within the head"
            read += byte
        return read.decode("latin-1")

    def body(self, length: int) -> bytes:
        read = bytearray()
        while len(read) < length:
            part = self.connection.recv(min(length - len(read), 1 << 20))
            assert part, "the connection ended within the body"
            read += part
        return bytes(read)

    def send(self, text: str | bytes) -> None:
        self.connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)

    def answer(self, body: str = "", status: str = "200 OK", **headers: str) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n{body}")

    def ended(self) -> bool:
        """Waits for the client to close the connection; False if it sends more, or nothing until the deadline."""
        try:
            return not self.connection.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True

    def reset(self) -> None:
        """Makes the connection end with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Script = Callable[[Peer], None]


class Server:
    """Accepts a connection for each script, in turn, and closes it when the script returns."""

    def __init__(self, *scripts: Script, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._context = context
        self._over = [threading.Event() for _ in scripts]
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._talk, args=(scripts,))
        self._thread.start()

    def _talk(self, scripts: tuple[Script, ...]) -> None:
        for script, over in zip(scripts, self._over, strict=True):
            try:
                connection, _ = self._listener.accept()
                connection.settimeout(DEADLINE_S)
                with connection:
                    if self._context is None:
                        script(Peer(connection))
                    else:
                        with self._context.wrap_socket(connection, server_side=True) as wrapped:
                            script(Peer(wrapped))
            except BaseException as error:
                self._failures.append(error)
            over.set()

    def wait_for(self, script: int) -> None:
        """Waits until a script has returned and its connection is closed."""
        wait_for(self._over[script], f"script {script} has returned")

    def close(self) -> None:
        self._thread.join(10)
        # Ends a script's wait for a connection that has never come.
        self._listener.shutdown(socket.SHUT_RDWR)
        end(self._thread)
        self._listener.close()
        if self._failures:
            raise self._failures[0]


def assert_(condition: object) -> None:
    assert condition


class Sink:
    """Memory that a body is poured into."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self._rest = memoryview(self.memory)

    def get_buffer(self) -> memoryview:
        return self._rest

    def buffer_updated(self, size: int) -> None:
        self._rest = self._rest[size:]


def poured(http: httpx.Client, url: str, size: int) -> bytes:
    with http.stream("GET", url) as response:
        sink = Sink(size)
        pour(response, sink)
    return bytes(sink.memory)


def post(http: httpx.Client, url: str, *pieces: bytes, **options: Any) -> httpx.Response:
    body = Body([memoryview(piece) for piece in pieces])
    request = http.build_request("POST", url, content=body, headers={"Content-Length": str(body.length)}, **options)
    request.stream = body
    return http.send(request)
