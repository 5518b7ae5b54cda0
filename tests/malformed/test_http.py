"""Channels that are not HTTP/1.1: refused with a problem document, in their turn, and nothing else is disturbed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx
import pytest

from harness import OWN_HEAD, ThreadService
from plain_calls import Api, slug
from raw_pushes import connected, head_of_a_push

UNREADABLE = {
    "a length that is none": b"POST /v1/runs HTTP/1.1\r\nHost: here\r\nContent-Length: ten\r\n\r\n",
    "two lengths": b"POST /v1/runs HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length and chunks": (
        b"POST /v1/runs HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a header with a space in its name": b"GET /v1/runs HTTP/1.1\r\nHost: here\r\nBad Header: 1\r\n\r\n",
    "a header without a colon": b"GET /v1/runs HTTP/1.1\r\nHost here\r\n\r\n",
    "a control character in a header": b"GET /v1/runs HTTP/1.1\r\nHost: he\x00re\r\n\r\n",
    "an unknown method": b"BREW /v1/runs HTTP/1.1\r\nHost: here\r\n\r\n",
    "another protocol": b"GET /v1/runs SPDY/1.1\r\nHost: here\r\n\r\n",
    "a target that is none": b"GET ?v1/runs HTTP/1.1\r\nHost: here\r\n\r\n",
    "the beginning of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
}


@pytest.fixture
def connection(service: ThreadService) -> Iterator[socket.socket]:
    with connected(service.url) as made:
        yield made


def answer(connection: socket.socket) -> httpx.Response:
    """The next answer, which another may follow."""
    response = HTTPResponse(connection)
    # Unbuffered, so that nothing of the next one is taken.
    response.fp = connection.makefile("rb", 0)
    response.begin()
    content = b""
    # A read may give less than is asked for.
    while len(content) < int(response.headers["Content-Length"]) and (more := response.fp.read(response.length)):
        content += more
        response.length -= len(more)
    return httpx.Response(response.status, headers=response.getheaders(), content=content)


def is_last_refused(connection: socket.socket) -> bool:
    """Whether the next answer is the refusal of what cannot be read, and the end."""
    refusal = answer(connection)
    assert (refusal.status_code, slug(refusal)) == (400, "malformed-request")
    assert refusal.json()["detail"].startswith("what was sent cannot be read as HTTP: ")
    assert refusal.headers["Connection"] == "close"
    return connection.recv(1) == b""


@pytest.mark.parametrize("sent", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_http_gets_a_problem_document(connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    assert is_last_refused(connection)


@pytest.mark.parametrize("sent", UNREADABLE.values(), ids=UNREADABLE)
def test_requests_before_it_are_answered_first(api: Api, connection: socket.socket, sent: bytes) -> None:
    api.create()
    good = f"GET {api.path()} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode()
    connection.sendall(3 * good + sent + good)
    for _ in range(3):
        assert answer(connection).json()["run"] == api.run
    assert is_last_refused(connection)


def test_it_is_refused_after_an_answer_too(api: Api, connection: socket.socket) -> None:
    api.create()
    connection.sendall(f"GET {api.path()} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
    assert answer(connection).status_code == 200
    connection.sendall(b"nonsense\r\n\r\n")
    assert is_last_refused(connection)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_body_that_cannot_be_read_does_nothing(api: Api, connection: socket.socket, before: int) -> None:
    spec = json.dumps(api.spec()).encode()
    connection.sendall(before * f"GET /v1/runs HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
    head = f"PUT {api.path()} HTTP/1.1\r\n{OWN_HEAD}Content-Type: application/json\r\n".encode()
    connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(spec), spec))
    connection.sendall(b"no chunk\r\n")
    for _ in range(before):
        assert answer(connection).status_code == 200
    assert is_last_refused(connection)
    assert api.http.get(api.path()).status_code == 404


def test_a_refused_push_is_not_answered_twice_by_what_follows_it(api: Api, connection: socket.socket) -> None:
    api.create()
    head = head_of_a_push(api.path("/gradients"), api.headers({"lease": "none", "token": 0}, 0), 3)
    connection.sendall(head + b"abc" + b"nonsense\r\n\r\n")
    assert slug(answer(connection)) == "lease-expired"
    assert is_last_refused(connection)
