"""What comes slowly, without end or in great numbers has bounds, and work goes on beside it."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from edge.answers import Peer, dialled
from edge.conftest import Edge
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.server import places_for
from freestep_service.settings import BadSetting, Settings
from freestep_service.tls import trusted_by
from harness import OWN_HEAD, ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, Api
from raw_pushes import connected, half_of_a_push

SHORT = {"head_seconds": 0.3, "json_seconds": 0.3, "idle_seconds": 0.5}
MIB = 1024**2


@pytest.fixture(params=["http", "https"])
def hurried(
    request: pytest.FixtureRequest, start_service: Callable[..., ThreadService], tls: dict[str, Path]
) -> ThreadService:
    """A service that waits for nobody."""
    return start_service(**SHORT, **(tls if request.param == "https" else {}))


@pytest.fixture
def peer(hurried: ThreadService) -> Iterator[Peer]:
    with dialled(hurried.url, hurried.trusted) as made:
        yield made


GET = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"


def is_well(peer: Peer) -> bool:
    peer.send(GET)
    return peer.answer().status == 200


@pytest.mark.parametrize("sent", [b"G", b"\r\n", GET[:-2], GET[:-2] + b"A: ", b"POST / HTTP/1.1\r\nContent-Le"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_head_that_does_not_come_is_refused(peer: Peer, sent: bytes, before: int) -> None:
    for _ in range(before):
        assert is_well(peer)
    peer.send(sent)
    answer = peer.answer()
    assert (answer.status, answer.slug, answer.headers["connection"]) == (408, "request-timeout", "close")
    assert peer.is_at_its_end()


def test_a_head_that_drips_is_refused(peer: Peer) -> None:
    peer.send(GET[:-2])
    # In one thread: a TLS connection is not to be read and written at once.
    peer.socket.settimeout(0.02)
    received = b""

    def is_refused() -> bool:
        nonlocal received
        try:
            received += peer.socket.recv(4096)
        except TimeoutError:
            peer.send(b"a: b\r\n")
        return b"request-timeout" in received

    wait_until(is_refused, 0)
    assert received.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("before", [0, 2])
def test_an_idle_connection_is_closed(peer: Peer, before: int) -> None:
    for _ in range(before):
        assert is_well(peer)
    assert peer.is_at_its_end()


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/runs/slow"), ("POST", "/v1/runs/none/leases"), ("POST", "/v1/runs/none/metrics")]
)
@pytest.mark.parametrize("media_type", ["application/json", MEDIA_TYPE])
def test_a_json_body_that_does_not_come_is_refused(
    peer: Peer, method: str, path: str, framing: str, media_type: str
) -> None:
    head = f"{method} {path} HTTP/1.1\r\n{OWN_HEAD}Content-Type: {media_type}\r\n{framing}\r\n\r\n"
    peer.send(head.encode(), b"5\r\n{    \r\n" if "chunked" in framing else b"{")
    answer = peer.answer()
    assert (answer.status, answer.slug) == (408, "request-timeout")
    # What is left of the body has its time, too.
    assert peer.is_at_its_end()


@pytest.mark.parametrize("length", [100, 70_000, 2**63])
@pytest.mark.parametrize("begun", [b"", b"a"])
def test_a_body_that_nobody_wants_has_its_time(peer: Peer, begun: bytes, length: int) -> None:
    peer.send(GET[:-2] + b"Content-Length: %d\r\n\r\n" % length)
    assert peer.answer().status == 200
    peer.send(begun)
    assert peer.is_at_its_end()


@pytest.mark.parametrize("drips", [False, True], ids=["stands still", "drips"])
@pytest.mark.parametrize("asked", ["owner", "other"])
def test_a_push_that_does_not_come_is_refused(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api], asked: str, drips: bool
) -> None:
    """Also at a process that relays it."""
    nodes = shared_nodes(2, stall_seconds=0.3)
    api = connect(nodes[0].url)
    api.create()
    lease = api.lease()
    owner = api.http.get(api.path("/topology")).json()["shards"][0]["url"]
    url = next(node.url for node in nodes if (node.url == owner) is (asked == "owner"))
    with dialled(url) as peer:
        refusal = under_way(peer.answer)
        peer.send(half_of_a_push(api, lease, 0, "key"))
        rest = iter(BODY[len(BODY) // 2 : -1])

        def is_refused() -> bool:
            if drips and (byte := next(rest, None)) is not None:
                peer.send(bytes([byte]))
            return refusal.done()

        wait_until(is_refused, 0.02)
        answer = refusal.result()
        assert (answer.status, answer.slug) == (400, "malformed-request")
    assert api.push(lease, 0, "key").json()["step"] == 1


@pytest.mark.parametrize("fields", [98, 100])
def test_a_head_has_a_number_of_fields(edge: Edge, fields: int) -> None:
    head = edge.head("GET") + b"".join(b"X-%d: a\r\n" % number for number in range(fields))
    with edge.peer() as peer:
        peer.send(head + b"\r\n")
        answer = peer.answer()
        if fields == 98:
            assert answer.status == 200
            return
        assert (answer.status, answer.slug) == (431, "headers-too-large")
        assert answer.document["fields"] == 100
        assert peer.is_at_its_end()


@pytest.mark.parametrize("size", [60_000, 66_000, 200_000])
@pytest.mark.parametrize("place", ["target", "value", "name"])
def test_a_head_has_a_length_however_it_is_cut(edge: Edge, place: str, size: int) -> None:
    filler = "a" * size
    target = f"?{filler}" if place == "target" else ""
    line = {"target": "X: a", "value": f"X: {filler}", "name": f"{filler}: a"}[place]
    with edge.peer() as peer:
        peer.send(edge.head("GET", target, line) + b"\r\n")
        answer = peer.answer()
        assert answer.status == (200 if size < 64 * 1024 else 431)


# In great numbers


@pytest.mark.parametrize("bomb", ["small headers", "one header", "one target", "trailers", "empty lines"])
def test_bombs_cost_no_memory(start_process: Callable[..., ProcessService], bomb: str) -> None:
    service = start_process()
    assert service.process is not None and service.process.pid is not None
    process = psutil.Process(service.process.pid)
    begin, piece = {
        "small headers": (GET[:-2], b"a:b\r\n" * 13_000),
        "one header": (GET[:-2] + b"A: ", b"a" * 65_000),
        "one target": (b"GET /", b"a" * 65_000),
        "trailers": (
            f"PUT /v1/runs/a HTTP/1.1\r\n{OWN_HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n".encode(),
            b"a:b\r\n" * 13_000,
        ),
        "empty lines": (b"", b"\r\n" * 32_000),
    }[bomb]
    with dialled(service.url) as peer:
        assert is_well(peer)
    before = 0
    for attempt in range(3):
        # The first brings the process to the size that it keeps.
        before = process.memory_info().rss if attempt == 1 else before
        with dialled(service.url) as peer:
            peer.send(begin)
            try:
                for _ in range(200):
                    peer.send(piece)
                assert peer.answer().status == 431
            except (ConnectionError, TimeoutError):
                # It was heard out for long enough.
                pass
    with dialled(service.url) as peer:
        assert is_well(peer)
    assert process.memory_info().rss - before < 48 * MIB


def garbage(number: int) -> bytes:
    """What may be sent by mistake, or for harm."""
    source = random.Random(number)
    return source.choice(
        [
            source.randbytes(source.randrange(1, 5000)),
            b"\x16\x03\x01\x02\x00" + source.randbytes(500),
            GET[: source.randrange(len(GET))],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz",
            b"PUT /v1/runs/x HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{",
            b"POST /v1/runs/x/gradients HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("speaks", ["http", "https"])
def test_pushes_go_on_beside_idle_connections_and_garbage(
    start_process: Callable[..., ProcessService], tls: dict[str, Path], speaks: str
) -> None:
    service = start_process(max_connections=150, max_connections_per_address=150, **(tls if speaks == "https" else {}))
    api = Api(service.url, trusted=trusted_by(Settings(**(tls if speaks == "https" else {}))))
    assert service.process is not None and service.process.pid is not None
    process = psutil.Process(service.process.pid)
    api.create()
    lease = api.lease()
    for step in range(5):
        assert api.push(lease, step).json()["step"] == step + 1
    before, descriptors = process.memory_info().rss, process.num_fds()
    with ExitStack() as stack:
        for number in range(200):
            # Of TLS, those that never say a word.
            stack.enter_context(connected(service.url.replace("https:", "http:")))
            noisy = stack.enter_context(connected(service.url.replace("https:", "http:")))
            noisy.sendall(garbage(number))
            if number % 10 == 0:
                step = 5 + number // 10
                assert api.push(lease, step).json()["step"] == step + 1
        # Redis may have taken some, too.
        assert process.num_fds() <= descriptors + 150 + 32
        assert process.memory_info().rss - before < 64 * MIB
    assert api.status()["pushes"]["applied"] == 25
    api.http.close()


def with_all_places_free(service: ThreadService) -> ThreadService:
    """The service, once the connection that asked whether it had started is gone: it would take one of few places."""
    wait_until(lambda: service.places.taken == 0)
    return service


@pytest.fixture
def small(start_service: Callable[..., ThreadService]) -> ThreadService:
    """A service with five places, of which one address may have four."""
    return with_all_places_free(start_service(max_connections=5, max_connections_per_address=4))


def test_idle_connections_make_room(small: ThreadService) -> None:
    with ExitStack() as stack:
        worker = stack.enter_context(dialled(small.url))
        assert is_well(worker)
        silent = [stack.enter_context(dialled(small.url)) for _ in range(20)]
        assert is_well(silent[-1])
        # Those that asked for nothing were closed, the longest silent first.
        assert all(each.is_at_its_end() for each in silent[:17])
        assert is_well(silent[-2])
        assert is_well(worker)


def test_who_finds_no_place_is_told(small: ThreadService) -> None:
    api = Api(small.url)
    api.create()
    api.http.close()
    wait_until(lambda: small.places.taken == 0)
    with ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(dialled(small.url))
            target = api.path("/parameters?min_step=9")
            waiting.send(f"GET {target} HTTP/1.1\r\n{OWN_HEAD}Prefer: wait=60\r\n\r\n".encode())
        addresses = small.places._addresses
        wait_until(lambda: small.places.taken == 4 and not any(each.new for each in addresses.values()))
        with dialled(small.url) as peer:
            (answer,) = peer.answers()
            assert (answer.status, answer.slug, answer.headers["retry-after"]) == (429, "overloaded", "1")
    wait_until(lambda: small.places.taken == 0)


def test_handshakes_that_are_not_made_end(start_service: Callable[..., ThreadService], tls: dict[str, Path]) -> None:
    bounds = {"head_seconds": 0.3, "max_connections": 4, "max_connections_per_address": 4}
    service = with_all_places_free(start_service(**bounds, **tls))
    silent = [connected(service.url.replace("https", "http")) for _ in range(4)]
    wait_until(lambda: service.places.taken == 4)
    wait_until(lambda: service.places.taken == 0)
    for each in silent:
        assert each.recv(1) == b""
        each.close()
    with dialled(service.url, service.trusted) as peer:
        assert is_well(peer)


def test_all_places_are_given_back(start_service: Callable[..., ThreadService]) -> None:
    service = start_service()
    with ExitStack() as stack:
        for number in range(40):
            peer = stack.enter_context(dialled(service.url))
            peer.send(garbage(number))
    wait_until(lambda: service.places.taken == 0)


def test_descriptors_are_left_for_the_rest() -> None:
    most = places_for(Settings()).most
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 0 < 2 * most <= limit - 256
    assert places_for(Settings()).most_per_address <= most
    assert places_for(Settings(max_connections=9, max_connections_per_address=20)).most_per_address == 9
    with pytest.raises(BadSetting, match=r"max_connections: .*ulimit"):
        places_for(Settings(max_connections=limit))


@pytest.mark.parametrize("speaks", ["http", "https"])
def test_who_reads_no_answer_leaves_the_place(
    start_service: Callable[..., ThreadService], tls: dict[str, Path], speaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers that no system's buffers hold, of any route, without a token."""
    bounds = {"max_connections": 5, "max_connections_per_address": 4, "stall_seconds": 0.5}
    service = with_all_places_free(start_service(**bounds, **(tls if speaks == "https" else {})))
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n" * 200

    def gone() -> int:
        return caplog.text.count("GET /openapi.json: aborted, the client read nothing for 0.5 s")

    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(dialled(service.url, service.trusted)).send(asked)
        wait_until(lambda: gone() == 4)
        wait_until(lambda: service.places.taken == 0)
        others = [stack.enter_context(dialled(service.url, service.trusted)) for _ in range(4)]
        assert all(is_well(each) for each in others)
