"""Connections fed with bytes, without a network: wherever these are cut, a request is the same; and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from fake_transport import FakeTransport
from freestep.errors import ShardUnavailable
from freestep_service.web.connection import CONNECTION, abort
from freestep_service.web.head import Bounds
from freestep_service.web.inlet import INLET
from freestep_service.web.waiting import while_connected

BODY = bytes(range(40))
HEAD = b"POST /a?b=c HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(BODY)
NEXT = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


BOUNDS = Bounds(small_bytes=16)
"""Bodies of more bytes are large."""


class Memory:
    """A sink that takes at most seven bytes at a time."""

    def __init__(self) -> None:
        self.received = bytearray()
        self._buffer = bytearray(7)

    def get_buffer(self) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, size: int) -> None:
        self.received += self._buffer[:size]


class App:
    """Keeps the bodies of its requests, those that come by an Inlet, and the errors that ended them."""

    def __init__(self, use_inlet: bool = True) -> None:
        self.bodies: list[bytes] = []
        self.errors: list[Exception] = []
        self._use_inlet = use_inlet

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        inlet = scope["extensions"].get(INLET)
        if inlet is not None and self._use_inlet:
            sink = Memory()
            try:
                await inlet.pour(sink, 10.0, asyncio.get_running_loop().time() + 10.0)
                self.bodies.append(bytes(sink.received))
            except EOFError as error:
                self.errors.append(error)
        else:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.errors.append(ClientDisconnect())
                    return
                body, more = body + message["body"], message["more_body"]
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("use_inlet", [True, False])
@pytest.mark.parametrize("cut", range(1, len(HEAD + BODY + NEXT)))
def test_a_request_may_be_cut_anywhere(cut: int, use_inlet: bool) -> None:
    async def work() -> None:
        app = App(use_inlet)
        transport, sent = FakeTransport(app, bounds=BOUNDS), HEAD + BODY + NEXT
        transport.feed(sent[:cut])
        await transport.turn()
        transport.feed(sent[cut:])
        await transport.turn()
        assert app.bodies == [BODY, b""]
        assert transport.written.count(OK) == 2
        transport.close()
        await transport.turn()

    run(work)


@pytest.mark.parametrize("use_inlet", [True, False])
@pytest.mark.parametrize("cut", range(len(HEAD + BODY)))
def test_a_request_may_end_anywhere(cut: int, use_inlet: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        app = App(use_inlet)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed((HEAD + BODY)[:cut])
        await transport.turn()
        transport.feed_eof()
        await transport.turn()
        assert transport.is_closing()
        assert transport.written == b""
        assert not app.bodies
        assert len(app.errors) == (cut >= len(HEAD))

    run(work)
    assert not caplog.records


def test_requests_without_pauses_are_answered_in_order() -> None:
    async def work() -> None:
        app = App()
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(3 * (HEAD + BODY + NEXT))
        for _ in range(6):
            await transport.turn()
        assert app.bodies == 3 * [BODY, b""]
        transport.close()
        await transport.turn()

    run(work)


@pytest.mark.parametrize("piece", [1000, 10**6])
def test_so_many_requests_may_wait_for_their_answers(piece: int) -> None:
    async def work() -> None:
        may_answer = asyncio.Event()

        async def patient(scope: Any, receive: Any, send: Any) -> None:
            # Has the connection read on, whether or not there is a body.
            await receive()
            await may_answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        transport, sent = FakeTransport(patient, bounds=BOUNDS), 1000 * NEXT
        for begin in range(0, len(sent), piece):
            transport.feed(sent[begin : begin + piece])
            await transport.turn()
        may_answer.set()
        while not transport.has_written_eof:
            await transport.turn()
        answers = transport.written.split(b"HTTP/1.1 ")[1:]
        assert [answer[:3] for answer in answers] == [*BOUNDS.unanswered * [b"200"], b"429"]
        assert b"connection: close" in answers[-1]
        transport.close()
        await transport.turn()

    run(work)


CHUNKED = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 1000, b"a: " + bytes([97]) * 6000, b"a" * 6000])
@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nHost: here\r\n", b"GET /", CHUNKED])
@pytest.mark.parametrize("before", [b"", NEXT, 2 * (HEAD + BODY)])
def test_an_endless_head_is_refused(before: bytes, begin: bytes, piece: bytes) -> None:
    async def work() -> None:
        transport = FakeTransport(App(), bounds=BOUNDS)
        transport.feed(before)
        await transport.turn()
        transport.feed(begin)
        for _ in range(20):
            transport.feed(piece)
            await transport.turn()
        # What is sent yet is read, so that the peer gets to read the refusal.
        assert transport.has_written_eof and not transport.is_closing()
        assert transport.written.count(OK) == before.count(b"HTTP/1.1")
        refusal = transport.written[transport.written.rindex(b"HTTP/1.1") :]
        # A target that goes on with a space is none.
        is_target = begin != b"GET /" or b" " not in piece
        status, slug = (431, b"headers-too-large") if is_target else (400, b"malformed-request")
        assert refusal.startswith(b"HTTP/1.1 %d " % status)
        assert b"urn:freestep:problem:" + slug in refusal
        transport.feed_eof()
        assert transport.is_closing()
        await transport.turn()

    run(work)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_long_head_is_read(size: int) -> None:
    async def work() -> None:
        app = App()
        transport = FakeTransport(app, bounds=BOUNDS)
        head = b"GET / HTTP/1.1\r\nHost: here\r\nA: " + b"a" * 60_000 + b"\r\n\r\n"
        for _ in range(3):
            for begin in range(0, len(head), size):
                transport.feed(head[begin : begin + size])
                await transport.turn()
            transport.feed(HEAD + BODY + CHUNKED + b"\r\n")
            await transport.turn()
        assert app.bodies == 3 * [b"", BODY, b"abc"]
        transport.close()
        await transport.turn()

    run(work)


# How connections end


@pytest.mark.parametrize("before", [b"", NEXT])
def test_an_aborted_answer_is_not_completed(before: bytes, caplog: pytest.LogCaptureFixture) -> None:
    answered: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        if scope["path"] == "/":
            await send({"type": "http.response.body", "body": b"abc"})
            return
        await send({"type": "http.response.body", "body": memoryview(b"a"), "more_body": True})
        assert abort(scope)
        await send({"type": "http.response.body", "body": b"bc"})
        answered.append(scope["path"])

    async def work() -> None:
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(before + b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n" + NEXT)
        await transport.turn()
        assert transport.is_aborted
        assert not transport.buffer
        assert transport.written.endswith(b"\r\n\r\na")

    run(work)
    assert answered == ["/a"]
    assert not caplog.records


def test_all_requests_of_a_connection_end_with_it() -> None:
    async def work() -> None:
        messages: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                messages.append((await receive())["type"])

        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(3 * NEXT)
        await transport.turn()
        transport.lose()
        await transport.turn()
        assert messages == ["http.request", "http.disconnect"]

    run(work)


def test_other_servers_connections_are_not_aborted() -> None:
    assert not abort({"type": "http"})
    assert not abort({"type": "http", "extensions": {}})


class Waiting:
    """An application whose requests wait until they are let go, `is_waiting` or not."""

    def __init__(self, is_waiting: bool) -> None:
        self.ended: list[BaseException | None] = []
        self.go = asyncio.Event()
        self._is_waiting = is_waiting

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with while_connected(scope, is_waiting=self._is_waiting):
                await self.go.wait()
            self.ended.append(None)
        except (ClientDisconnect, ShardUnavailable) as error:
            self.ended.append(error)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


@pytest.mark.parametrize("is_waiting", [True, False])
@pytest.mark.parametrize("behind", [b"", NEXT])
def test_a_wait_ends_with_the_connection(is_waiting: bool, behind: bytes) -> None:
    async def work() -> None:
        app = Waiting(is_waiting)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT + behind)
        await transport.turn()
        assert not app.ended
        transport.lose()
        await transport.turn()
        assert [type(error) for error in app.ended] == [ClientDisconnect]

    run(work)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_wait_behind_a_large_body_ends_with_the_connection(is_waiting: bool) -> None:
    async def work() -> None:
        waiting = Waiting(is_waiting)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"][INLET].pour(Memory(), 10.0, asyncio.get_running_loop().time() + 10.0)
            await waiting(scope, receive, send)

        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(HEAD + BODY)
        await transport.turn()
        transport.lose()
        await transport.turn()
        assert [type(error) for error in waiting.ended] == [ClientDisconnect]

    run(work)


@pytest.mark.parametrize("behind", [b"", NEXT])
def test_a_wait_ends_with_the_clients_side_of_the_connection(behind: bytes) -> None:
    async def work() -> None:
        app = Waiting(is_waiting=True)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT + behind)
        await transport.turn()
        transport.feed_eof()
        await transport.turn()
        requests = 1 + bool(behind)
        assert [type(error) for error in app.ended] == requests * [ShardUnavailable]
        assert transport.written.count(OK) == requests
        assert transport.is_closing()

    run(work)


@pytest.mark.parametrize(
    "sent", [NEXT, 3 * NEXT, HEAD + BODY, HEAD + BODY + NEXT, NEXT + b"GET /half HT", NEXT + HEAD + BODY[:9]]
)
def test_who_has_closed_their_side_gets_their_answers(sent: bytes) -> None:
    async def work() -> None:
        go, app = asyncio.Event(), App()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            async with while_connected(scope, is_waiting=False):
                await go.wait()
            await app(scope, receive, send)

        transport = FakeTransport(slow, bounds=BOUNDS)
        transport.feed(sent)
        transport.feed_eof()
        await transport.turn()
        assert not transport.is_closing()
        go.set()
        for _ in range(3):
            await transport.turn()
        complete = [BODY if each == b"POST" else b"" for each in (NEXT[:3], HEAD[:4]) for _ in range(sent.count(each))]
        incomplete = sent.endswith(BODY[:9]) and not sent.endswith(BODY)
        assert sorted(app.bodies) == sorted(complete[: len(complete) - sent.count(b"/half") - incomplete])
        assert transport.written.count(OK) == len(app.bodies)
        assert transport.is_closing()

    run(work)


def test_a_wait_ends_when_the_server_shuts_down() -> None:
    async def work() -> None:
        app = Waiting(is_waiting=True)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT)
        await transport.turn()
        transport.connection.shutdown()
        await transport.turn()
        assert [type(error) for error in app.ended] == [ShardUnavailable]
        assert transport.written.startswith(OK)
        assert transport.is_closing()

    run(work)


def test_what_is_not_a_wait_goes_on_when_the_server_shuts_down() -> None:
    async def work() -> None:
        app = Waiting(is_waiting=False)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT)
        await transport.turn()
        transport.connection.shutdown()
        await transport.turn()
        assert not app.ended
        app.go.set()
        await transport.turn()
        assert app.ended == [None]
        assert transport.written.startswith(OK)

    run(work)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_wait_that_is_over_is_not_ended_again(is_waiting: bool) -> None:
    async def work() -> None:
        app = Waiting(is_waiting)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT)
        await transport.turn()
        app.go.set()
        await transport.turn()
        assert app.ended == [None]
        transport.connection.shutdown()
        transport.feed_eof()
        await transport.turn()
        assert app.ended == [None]

    run(work)


def test_a_wait_that_begins_too_late_ends_at_once() -> None:
    async def work() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            begun.set()
            await ended.wait()
            await waiting(scope, receive, send)

        waiting = Waiting(is_waiting=True)
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(NEXT)
        await begun.wait()
        transport.lose()
        await transport.turn()
        ended.set()
        await transport.turn()
        assert [type(error) for error in waiting.ended] == [ClientDisconnect]

    run(work)


def test_a_timeout_of_the_waiting_itself_is_passed_on() -> None:
    async def work() -> None:
        raised: list[Exception] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            try:
                async with while_connected(scope, is_waiting=True):
                    raise TimeoutError("its own")
            except TimeoutError as error:
                raised.append(error)

        async def bare(scope: Any, receive: Any, send: Any) -> None:
            await app({key: value for key, value in scope.items() if key != "extensions"}, receive, send)

        for each in (app, bare):
            transport = FakeTransport(each, bounds=BOUNDS)
            transport.feed(NEXT)
            await transport.turn()
        assert [str(error) for error in raised] == ["its own", "its own"]

    run(work)


def test_every_request_knows_its_connection() -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope["extensions"][CONNECTION])
        await App()(scope, receive, send)

    async def work() -> None:
        transport = FakeTransport(app, bounds=BOUNDS)
        transport.feed(HEAD + BODY + NEXT)
        await transport.turn()
        assert found == [transport.connection] * 2

    run(work)
