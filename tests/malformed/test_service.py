"""Malformed bodies over HTTP: each is refused with its slug, in bounded memory, and no state changes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from freestep.wire.receiver import MEDIA_TYPE
from harness import ProcessService, ThreadService
from malformed.bodies import BODIES, KINDS, NON_FINITE, PARAMETERS, valid
from meanwhile import wait_until
from plain_calls import Api, slug
from raw_pushes import answered, connected, head_of_a_push

MIB = 1024**2


def request(api: Api, lease: dict[str, Any], changes: dict[str, Any], body: bytes = b"") -> socket.socket:
    """Sends a push with changed headers, where a list repeats a header; returns the connection."""
    connection = connected(api.url)
    headers = {**api.headers(lease, 0, "key"), **changes}
    connection.sendall(head_of_a_push(api.path("/gradients"), headers, len(body)) + body)
    return connection


@pytest.fixture
def hostile(api: Api) -> Api:
    """A run with the parameters that the bodies are made for."""
    assert api.http.put(api.path(), json=api.spec(parameters=PARAMETERS)).status_code == 201
    return api


def initialize(api: Api, body: bytes) -> str:
    answer = api.http.put(api.path("/parameters"), content=body, headers={"Content-Type": MEDIA_TYPE})
    return "" if answer.is_success else slug(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_gradient(hostile: Api, service: ThreadService, kind: str) -> None:
    assert initialize(hostile, valid()) == ""
    lease = hostile.lease()
    before = hostile.state(service)
    for name in KINDS[kind]:
        answer = hostile.push(lease, 0, "key", body=BODIES[name]())
        expected = "non-finite-gradient" if name in NON_FINITE else "malformed-tensors"
        assert (answer.status_code, slug(answer)) == (422, expected), name
        assert hostile.status()["step"] == 0, name
    assert hostile.state(service) == before
    assert hostile.push(lease, 0, "key", body=valid()).json()["step"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_as_initial_weights(hostile: Api, service: ThreadService, kind: str) -> None:
    before = hostile.state(service)
    for name in KINDS[kind]:
        assert initialize(hostile, BODIES[name]()) == "malformed-tensors", name
        assert not hostile.status()["initialized"], name
    assert hostile.state(service) == before
    assert initialize(hostile, valid()) == ""


def test_memory_is_bounded(start_process: Callable[..., ProcessService], connect: Callable[..., Api]) -> None:
    service = start_process()
    assert service.process is not None
    api = connect(service.url)
    api.http.put(api.path(), json=api.spec(parameters=PARAMETERS))
    assert initialize(api, valid()) == ""
    lease = api.lease()
    process = psutil.Process(service.process.pid)
    bodies = [make() for make in BODIES.values()]
    for body in bodies:
        api.push(lease, 0, body=body)
    before = process.memory_info().rss
    for _ in range(10):
        for body in bodies:
            assert api.push(lease, 0, body=body).status_code == 422
    assert process.memory_info().rss < before + 32 * MIB


LENGTHS: list[tuple[Any, bytes]] = [
    ("-1", b"400"),
    ("+40", b"400"),
    ("0x28", b"400"),
    ("1e3", b"400"),
    ("", b"400"),
    (["40", "41"], b"400"),
    ("40, 41", b"400"),
    ("9" * 19, b"400"),
    ("9" * 30, b"400"),
    ("9" * 18, b"413"),
    (str(2**40), b"413"),
    (str(2**35), b"422"),
    ("0", b"422"),
    ("7", b"422"),
]


@pytest.mark.parametrize(("length", "status"), LENGTHS, ids=[str(length)[:24] for length, _ in LENGTHS])
def test_an_impossible_length_is_refused_before_the_body(
    hostile: Api, service: ThreadService, length: Any, status: bytes
) -> None:
    initialize(hostile, valid())
    lease = hostile.lease()
    before = hostile.state(service)
    with request(hostile, lease, {"Content-Length": length}) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)
    assert hostile.state(service) == before
    assert hostile.push(lease, 0, "key", body=valid()).json()["step"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({name: ["1", "1"]} for name in ("Freestep-Lease", "Freestep-Token", "Freestep-Step", "Idempotency-Key")),
        {"Freestep-Step": "\xb2"},
        {"Freestep-Token": "1_0"},
        {"Idempotency-Key": "a b"},
        {"Idempotency-Key": "\xe9"},
        {"Transfer-Encoding": "chunked"},
        {"Prefer": "wait=" + "9" * 400},
    ],
    ids=str,
)
def test_a_bad_header_is_refused(hostile: Api, service: ThreadService, changes: dict[str, Any]) -> None:
    initialize(hostile, valid())
    lease = hostile.lease()
    before = hostile.state(service)
    with request(hostile, lease, changes, valid()) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert hostile.state(service) == before


@pytest.fixture(scope="module")
def hasty(shared_nodes: Callable[..., list[ThreadService]]) -> ThreadService:
    """A service with a short `stall_seconds`."""
    return shared_nodes(1, stall_seconds=0.3)[0]


@pytest.mark.parametrize("cut", [0, 4, 30, len(valid()) - 1])
@pytest.mark.parametrize("end", ["half-closed", "closed", "stalled"])
def test_a_body_shorter_than_its_length_leaves_nothing(
    hasty: ThreadService, connect: Callable[..., Api], end: str, cut: int
) -> None:
    api = connect(hasty.url)
    api.http.put(api.path(), json=api.spec(parameters=PARAMETERS))
    initialize(api, valid())
    lease = api.lease()
    before = api.state(hasty)
    with request(api, lease, {"Content-Length": str(len(valid()))}, valid()[:cut]) as connection:
        if end == "stalled":
            assert b"malformed-request" in answered(connection)
        elif end == "half-closed":
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(4096) == b""
    # A client that closes its connection does not see when the service has noticed.
    wait_until(lambda: api.state(hasty) == before)
    assert api.push(lease, 0, "key", body=valid()).json() == {
        "decision": "applied",
        "step": 1,
        "staleness": 0,
        "replayed": False,
    }


def test_claimed_lengths_cost_no_memory(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    assert service.process is not None
    api = connect(service.url)
    api.http.put(api.path(), json=api.spec(parameters=PARAMETERS))
    initialize(api, valid())
    lease = api.lease()
    process = psutil.Process(service.process.pid)
    api.push(lease, 0, body=b"")
    before = process.memory_info().rss
    for length in (2**63, 2**40, 2**36, 2**35, 2**24):
        for size in (2**40, 2**20, 60_000):
            connections = [
                request(api, lease, {"Content-Length": str(length)}, size.to_bytes(8, "little")) for _ in range(16)
            ]
            for connection in connections:
                assert connection.recv(4096).startswith(b"HTTP/1.1 4")
                connection.close()
    assert process.memory_info().rss < before + 16 * MIB
    assert api.push(lease, 0, body=valid()).json()["step"] == 1
