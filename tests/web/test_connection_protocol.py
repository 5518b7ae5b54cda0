"""Connections fed with bytes, without a network: wherever these are cut, a request is the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from fake_transport import FakeTransport
from freestep_service.web.connection import CONNECTION
from web.fed_bytes import BODY, BOUNDS, HEAD, NEXT, OK, App, run


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


@pytest.mark.parametrize("behind", [b"\r\n", b"x", 70_000 * b"x", NEXT])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.0\r\n\r\n", NEXT[:-2] + b"Connection: close\r\n\r\n"], ids=["1.0", "1.1"]
)
def test_nothing_is_answered_behind_the_last_request(sent: bytes, at_once: bool, behind: bytes) -> None:
    async def work() -> None:
        may_answer = asyncio.Event()

        async def patient(scope: Any, receive: Any, send: Any) -> None:
            await may_answer.wait()
            await App()(scope, receive, send)

        transport = FakeTransport(patient, bounds=replace(BOUNDS, head_seconds=0.0))
        for piece in [sent + behind] if at_once else [sent, behind]:
            transport.feed(piece)
            await transport.turn()
        may_answer.set()
        await transport.turn()
        assert transport.written.count(b"HTTP/1.1 ") == 1
        assert transport.written.startswith(OK) and transport.written.endswith(b"\r\n\r\n{}")
        assert transport.is_closing()

    run(work)
