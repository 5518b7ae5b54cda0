"""Peers behind slow lines: what they hold costs fast ones nothing.

Each test lets slow peers hold all the memory that a run has for fast ones, and has a fast worker exchange meanwhile: it
would wait for them for longer than a test may take. So nothing here is timed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import safetensors.torch
import torch

from harness import OWN_HEAD, ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug
from raw_pushes import answered, connected, head_of_a_push

NUMEL = 4 * 1024 * 1024
"""16 MiB as fp32: more than the buffers of sockets hold."""

WEIGHTS = {"w": torch.zeros(NUMEL)}
BODY = safetensors.torch.save({"w": torch.ones(NUMEL)})
SETTINGS = {"stall_seconds": 600, "queue_seconds": 600}
"""Peers may stand still for longer than the tests take."""


@pytest.fixture
def run(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> Iterator[Callable[..., Api]]:
    """Makes a run of one large tensor, on a service with settings of the test's own."""

    def make(**settings: object) -> Api:
        api = connect(start_service(**SETTINGS | settings).url)
        spec = {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [NUMEL]}],
        }
        assert api.http.put(api.path(), json=spec).status_code == 201
        assert api.initialize(WEIGHTS).status_code == 201
        return api

    yield make


def begin_pull(api: Api, point: str) -> socket.socket:
    """A pull whose answer is read as far as its first bytes."""
    connection = connected(api.url)
    # So that the kernel buffers little of the answer.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.sendall(f"GET {api.path('/parameters')}?point={point} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    return connection


@contextmanager
def stalled_readers(api: Api) -> Iterator[list[socket.socket]]:
    """Readers of different points, more than a run has vectors for, which read no further."""
    with ExitStack() as stack:
        yield [stack.enter_context(begin_pull(api, point)) for point in ("x", "y", "z")]


@contextmanager
def stalled_pushes(api: Api, count: int) -> Iterator[list[socket.socket]]:
    """Pushes of which half of the body has come, and no more does."""
    with ExitStack() as stack:
        connections = []
        for number in range(count):
            connection = stack.enter_context(connected(api.url))
            lease = api.lease(f"slow-{number}")
            head = head_of_a_push(api.path("/gradients"), api.headers(lease, 0, f"slow-{number}"), len(BODY))
            connection.sendall(head + BODY[: len(BODY) // 2])
            connections.append(connection)
        yield connections


def exchange(api: Api, lease: dict[str, str], step: int) -> None:
    """Pushes, and gets y in the answer, or the receipt alone and then y."""
    answer = api.http.post(
        api.path("/gradients"),
        content=BODY,
        headers={**api.headers(lease, step), "Prefer": "return=representation"},
    )
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        assert answer.json()["decision"] == "applied"
        return
    y = safetensors.torch.load(answer.content)["w"]
    assert torch.equal(y, torch.full((NUMEL,), -float(step + 1)))


@pytest.mark.slow
def test_slow_readers_hold_no_fast_worker_up(run: Callable[..., Api]) -> None:
    api = run()
    lease = api.lease()
    with stalled_readers(api) as readers:
        for step in range(5):
            exchange(api, lease, step)
        y, step = api.pull("y")
        assert (step, float(y["w"][0])) == (5, -5.0)
        # What they read is of the step at which they asked.
        for reader in readers:
            reader.settimeout(120)
            received = bytearray()
            while len(received) < 4 * NUMEL - 1024:
                part = reader.recv(1 << 20)
                assert part
                received += part
            assert not any(received[len(received) // 2 :])


@pytest.mark.slow
def test_slow_uploads_hold_no_fast_worker_up(run: Callable[..., Api]) -> None:
    api = run()
    lease = api.lease()
    with stalled_pushes(api, 3) as pushes:
        pending = api.redis_key("pending")
        assert pending
        for step in range(5):
            exchange(api, lease, step)
        for connection in pushes:
            connection.sendall(BODY[len(BODY) // 2 :])
            assert b'"applied"' in answered(connection)
    assert api.status()["step"] == 8


@pytest.mark.slow
def test_a_push_is_answered_with_its_receipt_where_slow_readers_hold_all(run: Callable[..., Api]) -> None:
    api = run(slow_peer_bytes=0)
    lease = api.lease()
    with stalled_readers(api) as readers:
        answer = api.http.post(
            api.path("/gradients"),
            content=BODY,
            headers={**api.headers(lease, 0), "Prefer": "return=representation"},
        )
        assert answer.status_code == 200
        if answer.headers["content-type"] == "application/json":
            assert answer.json()["decision"] == "applied"
            assert "Preference-Applied" not in answer.headers
        # With no memory for slow peers, those that hold it up are ended for a reader that waits.
        assert api.pull("z")[1] == 1
        assert len(readers) == 3


@pytest.mark.slow
def test_what_slow_peers_may_hold_is_bounded(run: Callable[..., Api]) -> None:
    """Of four stalled uploads, one has memory of the slow, two that of the fast, and one is ended for who waits."""
    api = run(slow_peer_bytes=4 * NUMEL)
    lease = api.lease()
    with stalled_pushes(api, 4) as pushes:
        exchange(api, lease, 0)

        def ended() -> int:
            count = 0
            for connection in pushes:
                connection.setblocking(False)
                try:
                    count += connection.recv(1, socket.MSG_PEEK) != b"-"
                except BlockingIOError:
                    pass
                finally:
                    connection.setblocking(True)
            return count

        wait_until(lambda: ended() >= 1)
        assert api.status()["step"] == 1
    refused = api.push(lease, 0, body=b"")
    assert slug(refused) in ("malformed-tensors", "lease-expired")
