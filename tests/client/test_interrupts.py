"""Signals that raise in the middle of what must not be left half done."""

from __future__ import annotations

import fcntl
import signal
import sys
import termios
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from traceback import walk_stack
from types import FrameType, SimpleNamespace
from typing import Any

import httpx
import pytest

from fake_service import FakeService
from freestep.answers import Pulled
from freestep.api.models import Lease, RunSpec
from freestep.bulk import BulkTransport
from freestep.bulk_exchange import Exchange
from freestep.flat import Flat
from freestep.forks import ForkLock
from freestep.lease import HeldLease
from freestep.membership import Membership
from freestep.sharding import ShardClient, ShardedCall
from freestep.threads import Threads
from freestep.transport import Transport
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import MEDIA_TYPE
from freestep.worker_group import SINGLE_PROCESS, Batch
from meanwhile import DEADLINE_S, at_once, wait_for, wait_until
from scripted import LARGE, Peer, Server, post, poured

SPEC = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [4]}]}


class Interrupted(BaseException):
    """What the signal raises."""


@pytest.fixture
def alarm() -> Iterator[None]:
    """Has SIGVTALRM raise."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGVTALRM, interrupt)
    yield
    signal.signal(signal.SIGVTALRM, before)


def test_a_signal_leaves_no_lock_held(alarm: None) -> None:
    lock = ForkLock()

    def is_open() -> bool:
        if lock.held.acquire(blocking=False):
            lock.held.release()
            return True
        return False

    for _ in range(100):
        try:
            with pytest.raises(Interrupted):
                # By the CPU's time: it comes while this thread computes.
                signal.setitimer(signal.ITIMER_VIRTUAL, 1e-4)
                while True:
                    with lock.held:
                        pass
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert at_once(is_open) == [True]


def test_a_worker_that_is_interrupted_between_two_leases_has_the_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(SPEC)
    held: list[HeldLease] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    with service.client() as client:
        membership = Membership(client.run("run"), "me", SINGLE_PROCESS, held)  # type: ignore[arg-type]
        membership.take_lease()
        service.restore()
        monkeypatch.setattr(held[0], "release", interrupt)
        with pytest.raises(KeyboardInterrupt):
            membership.take_lease()
        assert membership.granted.lease == "lease-2"
        assert membership.claim(Pulled(2, 0), Batch(None, None)).lease == "lease-2"


def test_a_renewal_waits_no_longer_than_leaves_time_for_another() -> None:
    waited: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            waited.append(request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("nobody answers on this connection")
        return httpx.Response(204)

    transport = Transport(httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer)), 60)
    lease = HeldLease(
        transport, "/v1/runs/r/leases", Lease(lease="l", token=1, worker="w", ttl_ms=6000, epoch=1, step=0)
    )
    wait_until(lambda: len(waited) == 2)
    assert waited == [2.0, 2.0]
    assert lease.lost is None
    lease.release()


def test_a_signal_that_does_not_end_a_wait_for_functions_is_noticed(alarm: None) -> None:
    """As one that comes just before the wait: here another thread gets it."""
    threads, goes_on = Threads(), threading.Event()

    def send() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGVTALRM)
        wait_for(goes_on, "the call is interrupted")

    with pytest.raises(Interrupted):
        threads.run_all([send, lambda: wait_for(goes_on, "the call is interrupted")])
    goes_on.set()
    threads.close()


def _grows(peer: Peer, seen: list[int]) -> bool:
    """Whether more of a body has come since this was asked last."""
    waiting = array("i", [0])
    fcntl.ioctl(peer.connection, termios.FIONREAD, waiting)
    seen.append(waiting[0])
    return seen[-2:-1] != seen[-1:]


@pytest.mark.parametrize("waits", ["to send", "for the head", "for the body", "for the rest of the body"])
def test_a_signal_that_does_not_end_a_wait_for_a_socket_is_noticed(
    serve: Callable[..., Server], alarm: None, waits: str
) -> None:
    main, noticed = threading.get_ident(), threading.Event()

    def is_in(function: Callable[..., object]) -> bool:
        return any(frame.f_code is function.__code__ for frame, _ in walk_stack(sys._current_frames()[main]))

    def script(peer: Peer) -> None:
        peer.head()
        if waits == "to send":
            seen: list[int] = []
            wait_until(lambda: not _grows(peer, seen), 0.1)
        if waits == "for the body":
            peer.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        if waits == "for the rest of the body":
            peer.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234")
        if "body" in waits:
            wait_until(lambda: is_in(Exchange.pour), 0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGVTALRM)
        wait_for(noticed, "the signal is noticed")

    url = serve(script).url
    with httpx.Client(transport=BulkTransport(), timeout=2 * DEADLINE_S) as http:
        with pytest.raises(Interrupted):
            if waits == "to send":
                post(http, url, LARGE)
            else:
                poured(http, url, 10)
        noticed.set()


@pytest.mark.parametrize("sends", [True, False])
def test_nothing_is_sent_from_memory_or_received_into_it_after_an_interrupt(
    serve: Callable[..., Server], alarm: None, sends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    main, changed = threading.get_ident(), threading.Event()
    both = threading.Barrier(2, lambda: signal.pthread_kill(main, signal.SIGVTALRM), DEADLINE_S)
    manifest = Manifest.of(RunSpec.model_validate({**SPEC, "parameters": [{"name": "w", "shape": [len(LARGE) // 4]}]}))
    vector, point = Flat(manifest), Flat(manifest)
    point.vector.fill_(1.0)

    def script(peer: Peer, shard: int) -> None:
        peer.head()
        body = b"".join(point.parts(2)[shard].body())
        if not sends:
            peer.send(f"HTTP/1.1 200 OK\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n")
            peer.send(body[:1000])
        both.wait()
        wait_for(changed, "the vector is used again")
        with suppress(OSError):
            if sends:
                while part := peer.connection.recv(1 << 20):
                    assert b"\x80\x3f" not in part
            else:
                peer.send(body[1000:])

    urls = [serve(partial(script, shard=shard)).url for shard in range(2)]
    known: Any = SimpleNamespace(epoch=1, shards=2)
    topology: Any = SimpleNamespace(epoch=1, shards=[SimpleNamespace(url=url) for url in urls])
    http = httpx.Client(base_url=urls[0], transport=BulkTransport(), timeout=2 * DEADLINE_S)
    with closing(Transport(http, 60, shares_memory=False)) as transport:
        shards = ShardClient(transport, lambda retry: known, lambda retry: topology, SINGLE_PROCESS)
        shards.note_epoch(1, 2)
        call = ShardedCall("POST", "/gradients", body=vector) if sends else ShardedCall("GET", "/y", into=vector)
        with pytest.raises(Interrupted):
            shards.request_all(call)
        vector.vector.fill_(1.0 if sends else 0.0)
        changed.set()
        transport.threads.run_all([lambda: None] * 2)
    if not sends:
        assert not vector.vector.any()
    assert not caplog.records
