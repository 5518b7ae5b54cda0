"""How connections end, and what waits on them, where bytes are fed without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from fake_transport import FakeTransport
from freestep.errors import ShardUnavailable
from freestep_service.web.connection import abort
from freestep_service.web.inlet import INLET
from freestep_service.web.waiting import while_connected
from web.fed_bytes import BODY, BOUNDS, HEAD, NEXT, OK, App, Memory, run


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
