"""Large bodies, on plain connections and over TLS: received in place, whatever the sender does, and the connection
goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.client import parse_headers
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import uvicorn

from freestep.errors import MalformedTensors
from freestep.wire.receiver import lay
from freestep_service.settings import Settings
from freestep_service.tls import trusted_by, uvicorn_options
from freestep_service.web.connection import Connection
from freestep_service.web.inlet import INLET
from harness import OWN_HEAD, ThreadService
from meanwhile import wait_until
from plain_calls import SGD, Api, slug
from raw_pushes import connected, head_of_a_push

NUMEL = 100_000
WEIGHTS = {"w": torch.zeros(NUMEL)}
GRADIENT = {"w": torch.arange(NUMEL, dtype=torch.float32)}
BODY = safetensors.torch.save(GRADIENT)


class Large(Api):
    """Calls to a run whose bodies are received in place."""

    def create(self, **changes: Any) -> Any:
        parameters = [{"name": "w", "shape": [NUMEL]}]
        made = self.http.put(self.path(), json=self.spec(parameters=parameters, optimizer=SGD, **changes))
        assert self.initialize(WEIGHTS).status_code == 201
        return made

    def head(self, lease: dict[str, Any], step: int, key: str, **changes: Any) -> bytes:
        return head_of_a_push(self.path("/gradients"), {**self.headers(lease, step, key), **changes}, len(BODY))

    def w(self) -> torch.Tensor:
        return self.pull("y")[0]["w"]


@pytest.fixture(params=["http", "https"])
def settings(request: pytest.FixtureRequest, tls: dict[str, Path]) -> dict[str, Path]:
    """Of a service that speaks the one or the other."""
    return tls if request.param == "https" else {}


@pytest.fixture
def service(request: pytest.FixtureRequest, settings: dict[str, Path], service: ThreadService) -> ThreadService:
    return request.getfixturevalue("tls_service") if settings else service


@pytest.fixture
def large(service: ThreadService) -> Iterator[Large]:
    api = Large(service.url, trusted=service.trusted)
    api.create()
    yield api
    api.http.delete(api.path())
    api.http.close()


class Caller:
    """A connection, on which answers are read one after another."""

    def __init__(self, made: socket.socket) -> None:
        self.socket = made
        self.sendall = made.sendall
        self._answers = made.makefile("rb")

    def answer(self) -> tuple[int, Any]:
        """The next answer's status and document."""
        status = int(self._answers.readline().split()[1])
        headers = parse_headers(self._answers)
        return status, json.loads(self._answers.read(int(headers["Content-Length"] or 0)) or b"null")

    def document(self) -> Any:
        return self.answer()[1]

    def problem(self) -> str:
        """The next answer's slug."""
        return str(self.document()["type"]).rpartition(":")[2]

    def close(self) -> None:
        self._answers.close()
        self.socket.close()


@pytest.fixture
def call(service: ThreadService) -> Iterator[Caller]:
    caller = Caller(connected(service.url, service.trusted))
    yield caller
    caller.close()


def test_pushes_share_a_connection(large: Large, call: Caller) -> None:
    lease = large.lease()
    for step in range(3):
        call.sendall(large.head(lease, step, f"key-{step}") + BODY)
        assert call.document()["step"] == step + 1
    assert torch.equal(large.w(), -3 * GRADIENT["w"])


def test_pushes_that_are_sent_without_waiting_are_answered_in_order(large: Large, call: Caller) -> None:
    lease = large.lease()
    for step in range(3):
        call.sendall(large.head(lease, 0, f"key-{step}") + BODY)
    call.sendall(f"GET {large.path()} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
    assert [call.document()["step"] for _ in range(4)] == [1, 2, 3, 3]


@pytest.mark.parametrize("size", [1, 7, 1000, 65_536, len(BODY) - 1])
def test_a_body_may_come_in_pieces(large: Large, call: Caller, size: int) -> None:
    call.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    call.sendall(large.head(large.lease(), 0, "key"))
    # The small ones at the front, where the header is; the rest at once.
    for begin in range(0, min(200 * size, len(BODY)), size):
        call.sendall(BODY[begin : begin + size])
    call.sendall(BODY[200 * size :])
    assert call.document()["decision"] == "applied"
    assert torch.equal(large.w(), -GRADIENT["w"])


def test_who_expects_a_go_ahead_gets_it_once_the_claim_is_admitted(large: Large, call: Caller) -> None:
    lease = large.lease()
    for step in range(2):
        call.sendall(large.head(lease, step, f"key-{step}", Expect="100-continue"))
        assert call.answer() == (100, None)
        call.sendall(BODY)
        assert call.document()["step"] == step + 1


def test_who_is_refused_a_go_ahead_may_leave_the_body_unsent(large: Large, call: Caller) -> None:
    call.sendall(large.head({**large.lease(), "token": 0}, 0, "key", Expect="100-continue"))
    assert call.problem() == "lease-expired"
    # Nobody could say whether the body follows or the next request.
    assert call.socket.recv(1) == b""


@pytest.mark.parametrize(
    ("spoil", "slug_"),
    [
        (lambda body: body[:8] + b"[" + body[9:], "malformed-tensors"),
        (lambda body: (2**40).to_bytes(8, "little") + body[8:], "malformed-tensors"),
        (lambda body: body.replace(b'"F32"', b'"F31"'), "malformed-tensors"),
        (lambda body: body[:-4] + b"\xff\xff\xff\x7f", "non-finite-gradient"),
    ],
)
def test_the_connection_goes_on_behind_a_refused_body(
    large: Large,
    service: ThreadService,
    call: Caller,
    spoil: Callable[[bytes], bytes],
    slug_: str,
) -> None:
    lease = large.lease()
    before = large.state(service)
    head = large.head(lease, 0, "key")
    call.sendall(head)
    call.sendall(spoil(BODY))
    assert call.problem() == slug_
    assert large.state(service) == before
    call.sendall(head + BODY)
    assert call.document()["step"] == 1


def test_the_connection_goes_on_behind_a_body_that_nobody_wanted(large: Large, call: Caller) -> None:
    lease = large.lease()
    call.sendall(large.head({**lease, "lease": "nobody"}, 0, "key") + BODY)
    assert call.problem() == "lease-expired"
    call.sendall(large.head(lease, 0, "key") + BODY)
    assert call.document()["step"] == 1


def test_a_body_that_comes_again_is_read_for_its_digest(large: Large, call: Caller) -> None:
    lease = large.lease()
    for replayed in (False, True):
        call.sendall(large.head(lease, 0, "key") + BODY)
        assert call.document()["replayed"] is replayed
    call.sendall(large.head(lease, 0, "key") + BODY[:-1] + b"\x01")
    assert call.problem() == "idempotency-conflict"
    assert torch.equal(large.w(), -GRADIENT["w"])


@pytest.mark.parametrize("cut", [0, 100, 70_000, len(BODY) - 1])
@pytest.mark.parametrize("end", ["half-closed", "closed", "reset", "stalled"])
def test_a_body_that_ends_early_leaves_nothing(
    start_service: Callable[..., ThreadService], settings: dict[str, Path], end: str, cut: int
) -> None:
    service = start_service(stall_seconds=0.3, **settings)
    large = Large(service.url, trusted=service.trusted)
    large.create()
    lease = large.lease()
    before = large.state(service)
    pending = large.redis_key("pending")
    call = Caller(connected(service.url, service.trusted))
    call.sendall(large.head(lease, 0, "key") + BODY[:cut])
    wait_until(lambda: bool(service.redis_dump(pending)))
    if end == "stalled":
        assert call.problem() == "malformed-request"
    elif end == "half-closed":
        call.socket.shutdown(socket.SHUT_WR)
        # Nothing but what TLS itself has to say.
        wait_until(lambda: call.socket.recv(1024) == b"")
    elif end == "reset":
        call.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if end != "stalled":
        call.close()
    wait_until(lambda: not service.redis_dump(pending))
    assert large.state(service) == before
    assert large.push(lease, 0, "key", body=BODY).json()["step"] == 1
    if end == "stalled":
        # What comes late still counts as the body's rest, and what comes behind it as the next request.
        call.sendall(BODY[cut:] + large.head(lease, 1, "next") + BODY)
        assert call.document()["step"] == 2
        call.close()
    large.http.close()


def test_a_body_of_unknown_length_is_refused(large: Large) -> None:
    lease = large.lease()
    chunks = (BODY[begin : begin + 10_000] for begin in range(0, len(BODY), 10_000))
    answer = large.http.post(large.path("/gradients"), content=chunks, headers=large.headers(lease, 0))
    assert (answer.status_code, slug(answer)) == (411, "length-required")


class App:
    """An ASGI application that takes in what comes in place."""

    def __init__(self, most: int) -> None:
        self.offered: list[bool] = []
        self.bodies: list[bytes] = []
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        inlet = scope.get("extensions", {}).get(INLET)
        self.offered.append(inlet is not None)
        if inlet is not None:
            sink = Memory(self._most)
            try:
                await inlet.pour(sink, 10.0, asyncio.get_running_loop().time() + 10.0)
            except MalformedTensors:
                pass
            self.bodies.append(sink.taken())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


class Memory:
    """A sink with room for `most` bytes, which gives up there."""

    def __init__(self, most: int) -> None:
        self._memory = bytearray(most)
        self._size = 0

    def get_buffer(self) -> memoryview:
        return memoryview(self._memory)[self._size :][:50_000]

    def buffer_updated(self, size: int) -> None:
        self._size += size
        if self._size == len(self._memory):
            raise MalformedTensors

    def taken(self) -> bytes:
        return bytes(self._memory[: self._size])


REQUESTS = [
    (b"Content-Length: 100000\r\n\r\n" + bytes(100_000), True),
    (b"Content-Length: 65536\r\n\r\n" + bytes(65_536), False),
    (b"Content-Length: 65537\r\n\r\n" + bytes(65_537), True),
    (b"\r\n", False),
    (b"Transfer-Encoding: chunked\r\n\r\n186a0\r\n" + bytes(100_000) + b"\r\n0\r\n\r\n", False),
]


@pytest.mark.parametrize("most", [1 << 20, 10, 60_000])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_only_a_large_body_of_known_length_has_an_inlet(settings: dict[str, Path], loop: Any, most: int) -> None:
    app = App(most)
    listener = socket.create_server(("127.0.0.1", 0))
    chosen = Settings(**settings)
    url = chosen.url_of(*listener.getsockname())
    config = uvicorn.Config(
        app, http=Connection, loop=loop, ws="none", lifespan="off", log_level="warning", **uvicorn_options(chosen)
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        call = Caller(connected(url, trusted_by(chosen)))
        for rest, offered in REQUESTS:
            call.sendall(b"POST / HTTP/1.1\r\nHost: here\r\n" + rest)
            assert call.answer() == (200, {})
            assert app.offered[-1] is offered
        call.close()
    finally:
        server.should_exit = True
        thread.join()
    assert app.bodies == [bytes(min(most, 100_000)), bytes(min(most, 65_537))]


def test_a_sink_that_is_full_is_not_given_more() -> None:
    with pytest.raises(MalformedTensors):
        lay(Memory(10), b"more than ten bytes")
