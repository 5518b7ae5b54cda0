"""Pushes as raw bytes over sockets, so that a test decides how much of one is sent."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from harness import AUTHORIZED, ThreadService
from meanwhile import DEADLINE_S
from plain_calls import BODY, Api


def head_of_a_push(target: str, headers: Mapping[str, str | list[str]], length: int = len(BODY)) -> bytes:
    """The head of a push as raw bytes; a header whose value is a list is repeated."""
    lines = [f"POST {target} HTTP/1.1"]
    for name, value in {"Host": "127.0.0.1", **AUTHORIZED, "Content-Length": str(length), **headers}.items():
        lines += [f"{name}: {each}" for each in ([value] if isinstance(value, str) else value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def half_of_a_push(api: Api, lease: dict[str, Any], step: int, key: str) -> bytes:
    """A push of BODY as raw bytes, up to the middle of the body."""
    return head_of_a_push(api.path("/gradients"), api.headers(lease, step, key)) + BODY[: len(BODY) // 2]


def connected(url: str, trusted: ssl.SSLContext | None = None) -> socket.socket:
    """A connection of the test's own to a service, with a deadline for each send and receive.

    trusted: whose certificates are accepted at https URLs.
    """
    address = urlsplit(url)
    made = socket.create_connection((address.hostname, address.port), timeout=DEADLINE_S)
    if address.scheme == "http":
        return made
    assert trusted is not None
    return trusted.wrap_socket(made, server_hostname=address.hostname)


def begun_push(api: Api, lease: dict[str, Any], sent: bytes, key: str = "raw", **more: str) -> socket.socket:
    """Begins a push of BODY at step 0: sends its head and some bytes of the body; returns the connection."""
    connection = connected(api.url)
    connection.sendall(head_of_a_push(api.path("/gradients"), api.headers(lease, 0, key, **more)) + sent)
    return connection


def answered(connection: socket.socket) -> bytes:
    """The body of the response on a connection."""
    response = HTTPResponse(connection)
    response.begin()
    return response.read()


@contextmanager
def begun(
    url: str,
    method: str,
    path: str,
    length: int,
    headers: Mapping[str, str],
    trusted: ssl.SSLContext | None = None,
) -> Iterator[Callable[[bytes], tuple[int, dict[str, Any]]]]:
    """A request that was let in, whose body is waited for; what sends it, for the answer's status and document."""
    with connected(url, trusted) as connection:
        lines = {"Host": "127.0.0.1", "Content-Length": str(length), "Expect": "100-continue", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
        assert connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"

        def send(body: bytes) -> tuple[int, dict[str, Any]]:
            connection.sendall(body)
            answer = HTTPResponse(connection)
            answer.begin()
            return answer.status, json.loads(answer.read())

        yield send


def is_pending(service: ThreadService, api: Api, key: str) -> bool:
    """Whether a push is admitted and not yet committed."""
    pending = api.redis_key("pending")
    return key in service.redis_dump(pending).get(pending, {})
