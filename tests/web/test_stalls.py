"""Whose peers take nothing of their answers: their connections end, by a clock of the test's own."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import uvloop

from fake_transport import FakeTransport
from freestep_service.web.connection import may_stall
from freestep_service.web.head import Bounds
from freestep_service.web.inlet import INLET
from freestep_service.web.places import Place, Places
from freestep_service.web.stalls import Stall

GET = b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n"
LAST = GET[:-2] + b"Connection: close\r\n\r\n"
SIZE = 100_000
SECONDS = 10.0


class Clock:
    """The event loop of a connection, whose timers fire when the test says so."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = 0.0
        self._timers: list[tuple[float, asyncio.TimerHandle, Callable[..., object], tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(0.0, callback, args, self._loop)
        self._timers.append((self._now + delay, timer, callback, args))
        return timer

    def advance(self, seconds: float) -> None:
        until = self._now + seconds
        while due := [each for each in self._timers if each[0] <= until and not each[1].cancelled()]:
            first = min(due, key=lambda each: each[0])
            self._timers.remove(first)
            self._now, _, callback, args = first
            callback(*args)
        self._now = until

    @property
    def waiting(self) -> int:
        return sum(not timer.cancelled() for _, timer, _, _ in self._timers)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


class App:
    """Answers at once with so many bytes, whose client may read nothing for so many seconds."""

    def __init__(self, seconds: float | None = None, size: int = SIZE) -> None:
        self.begun = 0
        self.ended = 0
        self.size = size
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        if self._seconds is not None:
            may_stall(scope, self._seconds)
        length = b"%d" % self.size
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": bytes(self.size)})
        self.ended += 1


async def asked(app: App, sent: bytes, place: Place | None = None, idle: float = 1000.0) -> tuple[FakeTransport, Clock]:
    """A peer that has read nothing of the answers to what it has sent; `idle`: seconds for which it may be idle."""
    transport = FakeTransport(app, reads=0, place=place)
    clock = transport.connection.loop = Clock()
    transport.connection.timeout_keep_alive = idle
    transport.feed(sent)
    await transport.turn()
    return transport, clock


@pytest.mark.parametrize("requests", [1, 2, 48])
def test_who_takes_nothing_is_given_up(requests: int, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        app = App()
        transport, clock = await asked(app, requests * GET)
        clock.advance(SECONDS - 1)
        assert not transport.is_aborted
        clock.advance(1)
        assert transport.is_aborted
        await transport.turn()
        # The answer that waited ends, and those behind it do not begin.
        assert app.begun == app.ended == min(requests, 2)
        clock.advance(1000)

    run(work)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "GET /a: aborted, the client read nothing for 10 s"


def test_who_takes_something_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        app = App()
        transport, clock = await asked(app, 3 * GET)
        for _ in range(50):
            clock.advance(SECONDS - 1)
            transport.read(1)
            await transport.turn()
        assert not transport.is_aborted
        transport.read(4 * SIZE)
        for _ in range(3):
            await transport.turn()
        assert app.ended == 3
        assert transport.written.count(bytes(SIZE)) == 3
        # What is left is the time for which it may be idle.
        assert clock.waiting == 1
        transport.close()
        await transport.turn()

    run(work)
    assert not caplog.records


def test_who_may_stall_for_longer_has_that_time_for_what_was_sent() -> None:
    async def work() -> None:
        transport, clock = await asked(App(600.0), 2 * GET)
        clock.advance(599)
        assert not transport.is_aborted
        clock.advance(1)
        assert transport.is_aborted
        await transport.turn()

    run(work)


@pytest.mark.parametrize("size", [SIZE, 100])
def test_the_next_client_of_a_connection_has_no_longer_time(size: int) -> None:
    async def work() -> None:
        app = App(600.0, size)
        transport, clock = await asked(app, GET)
        transport.read(transport.get_write_buffer_size())
        await transport.turn()
        app._seconds, app.size = None, SIZE
        transport.feed(GET)
        await transport.turn()
        clock.advance(SECONDS)
        assert transport.is_aborted
        await transport.turn()

    run(work)


@pytest.mark.parametrize(("sent", "idle"), [(LAST, 1000.0), (GET, 5.0)], ids=["last", "idle"])
def test_an_answer_behind_which_the_connection_ends_has_the_time_of_any(sent: bytes, idle: float) -> None:
    async def work() -> None:
        transport, clock = await asked(App(), sent, idle=idle)
        for _ in range(SIZE // 1000):
            clock.advance(SECONDS - 1)
            transport.read(1000)
            await transport.turn()
        assert transport.is_closing() and not transport.is_aborted
        transport.read(1000)
        await transport.turn()
        assert transport.written.endswith(b"\r\n\r\n" + bytes(SIZE))
        assert not clock.waiting

    run(work)


@pytest.mark.parametrize("read", [0, SIZE])
@pytest.mark.parametrize(("sent", "idle"), [(LAST, 1000.0), (GET, 5.0)], ids=["last", "idle"])
def test_who_takes_nothing_of_an_answer_behind_which_the_connection_ends_is_given_up(
    sent: bytes, idle: float, read: int
) -> None:
    async def work() -> None:
        transport, clock = await asked(App(), sent, idle=idle)
        transport.read(read)
        clock.advance(2 * SECONDS)
        assert transport.is_aborted
        await transport.turn()
        assert not clock.waiting

    run(work)


def test_who_has_not_taken_the_answer_is_not_idle() -> None:
    async def work() -> None:
        places = Places(1, 1)
        place = places.take("here")
        transport, clock = await asked(App(), GET, place)
        assert places.take("here") is None
        assert not transport.is_closing()
        transport.read(SIZE)
        assert places.take("here") is not None
        assert transport.is_closing()
        # Of what is left, nobody waits for more.
        clock.advance(SECONDS)
        assert transport.is_aborted
        await transport.turn()

    run(work)


class Refusing:
    """A sink that takes nothing."""

    def get_buffer(self) -> memoryview:
        return memoryview(bytearray(100))

    def buffer_updated(self, size: int) -> None:
        raise ValueError


@pytest.mark.parametrize("use_inlet", [True, False])
def test_the_rest_of_a_body_that_was_answered_without_it_may_not_stand_still(use_inlet: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if use_inlet:
            with suppress(ValueError):
                await scope["extensions"][INLET].pour(Refusing(), 10.0, asyncio.get_running_loop().time() + 10.0)
        await App(size=2)(scope, receive, send)

    async def work() -> None:
        transport = FakeTransport(app)
        clock, idle = Clock(), Bounds().idle_seconds
        transport.connection.loop = clock
        transport.feed(GET[:-2] + b"Content-Length: 1000000000\r\n\r\n")
        await transport.turn()
        for _ in range(5):
            transport.feed(b"some")
            await transport.turn()
            clock.advance(idle - 1)
        assert transport.written and not transport.is_closing()
        clock.advance(1)
        assert transport.is_closing()
        await transport.turn()

    run(work)


def test_a_lost_connection_is_not_watched() -> None:
    async def work() -> None:
        transport, clock = await asked(App(), 2 * GET)
        transport.lose()
        await transport.turn()
        assert not clock.waiting

    run(work)


@pytest.mark.parametrize("run_on", [asyncio.run, uvloop.run])
def test_what_the_peers_system_takes_counts(run_on: Callable[..., None]) -> None:
    """The transport's own buffer stands still while less is taken than the system sends at a time."""

    async def work() -> None:
        ended: list[float] = []
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            peer.connect(listener.getsockname())
            peer.setblocking(False)
            accepted, _ = listener.accept()
            accepted.setblocking(False)
            loop: Any = asyncio.get_running_loop()
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
            stall, clock = Stall(transport, SECONDS, ended.append), Clock()
            transport.write(bytes(16 * 1024 * 1024))
            stall.watch(clock)  # type: ignore[arg-type]
            left = before = stall._left()
            while left[0] != before[0] or left[1] == before[1]:
                before = stall._left()
                await loop.sock_recv(peer, 16 * 1024)
                left = stall._left()
            clock.advance(SECONDS)
            assert not ended
            transport.abort()

    run_on(work())
