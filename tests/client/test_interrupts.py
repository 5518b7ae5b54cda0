"""Signals that raise in the middle of what must not be left half done."""

from __future__ import annotations

import fcntl
import signal
import ssl
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
import torch
import trustme
from torch import nn

from fake_service import FakeService
from freestep import RemoteOptimizer
from freestep.answers import Pulled
from freestep.api.models import Lease, RunSpec
from freestep.bulk import BulkTransport
from freestep.bulk_exchange import Exchange
from freestep.flat import Flat
from freestep.forks import ForkLock
from freestep.joined_optimizer import JoinedOptimizer
from freestep.lease import HeldLease
from freestep.membership import Membership
from freestep.rounds import LocalRound
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


def test_a_lease_that_nobody_has_got_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    service, start = FakeService(SPEC), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with service.client() as client:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.run("run").lease("me")
        monkeypatch.undo()
        wait_until(lambda: service.asked[-1].method == "DELETE")


def interrupt_at(number: int, function: Callable[..., Any], call: Callable[[], object]) -> bool:
    """Has a signal raise before the instruction of this number, of freestep's from the first one of a function on;
    whether there was one."""
    left, has_begun = number, False

    def begin(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal has_begun
        has_begun = has_begun or frame.f_code is function.__code__
        if not has_begun or "/freestep/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        return count

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "opcode"
        if not left:
            raise Interrupted
        return count

    sys.settrace(begin)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_model_contains_a_whole_point_after_an_interrupt() -> None:
    model = nn.ParameterList(
        [torch.randn(size, dtype=dtype) for size in (3, 40_000) for dtype in (torch.float32, torch.bfloat16)]
    )
    with RemoteOptimizer(model.named_parameters(), url="local", lr=0.1) as optimizer:
        points = {}
        for _ in range(3):
            sum(each.float().square().sum() for each in model).backward()
            optimizer.step()
        points["y"] = [each.detach().clone() for each in model]
        optimizer.eval()
        points["x"] = [each.detach().clone() for each in model]
        for call in (optimizer.train, optimizer.eval):
            number, was_interrupted = 0, True
            while was_interrupted:
                number += 1
                # Else there is nothing to load.
                optimizer.train() if call == optimizer.eval else optimizer.eval()
                was_interrupted = interrupt_at(number, JoinedOptimizer._load_received, call)
                expected = points[optimizer.loaded.point]
                assert all(torch.equal(one, other) for one, other in zip(model, expected, strict=True)), number
            assert number > 100


def test_a_round_is_moved_whole_after_an_interrupt() -> None:
    manifest = Manifest.of(
        RunSpec.model_validate({**SPEC, "parameters": [{"name": name, "shape": [4]} for name in "ab"]})
    )
    number, was_interrupted = 0, True
    while was_interrupted:
        number += 1
        tensors = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.bfloat16)}
        moved = LocalRound(manifest, tensors, 1, lambda: 0.0)
        moved.begin(Pulled(1, 0))
        for tensor in tensors.values():
            tensor.add_(1.0)
        y = Flat(manifest)
        y.vector.fill_(64.0)
        was_interrupted = interrupt_at(number, LocalRound.move, lambda moved=moved, y=y: moved.move(y))
        if was_interrupted:
            moved.move(y)
        assert moved.start.vector.tolist() == [64.0] * 8
        assert all(tensor.tolist() == [65.0] * 4 for tensor in tensors.values()), number
    assert number > 50


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


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("sends", [True, False])
def test_nothing_is_sent_from_memory_or_received_into_it_after_an_interrupt(
    serve: Callable[..., Server], alarm: None, sends: bool, is_secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    authority, trusting, context = trustme.CA(), ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.configure_trust(trusting)
    authority.issue_cert("127.0.0.1").configure_cert(context)
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

    secured = {"context": context} if is_secure else {}
    urls = [serve(partial(script, shard=shard), **secured).url for shard in range(2)]
    known: Any = SimpleNamespace(epoch=1, shards=2)
    topology: Any = SimpleNamespace(epoch=1, shards=[SimpleNamespace(url=url) for url in urls])
    http = httpx.Client(base_url=urls[0], transport=BulkTransport(verify=trusting), timeout=2 * DEADLINE_S)
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
