"""Points as answers, without a network: ranges, and memory that no transport refers to once it may be used again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.requests import Request

from asgi_calls import Answer, call, scope_of
from fake_transport import FakeTransport
from freestep.errors import RangeNotSatisfiable, ShardUnavailable
from freestep.wire.spans import Span
from freestep_service.runs.consistent_reads import Reading
from freestep_service.web.error_boundary import ErrorBoundary
from freestep_service.web.responses import SnapshotResponse, not_modified, parse_range, requested_span

SIZE = 3 * 1024 * 1024 + 5
DATA = bytes(range(251)) * (SIZE // 251 + 1)
HEADER = b"h" * 100
GET = b"GET /point HTTP/1.1\r\nHost: here\r\n\r\n"


class Point:
    """A run with one point, in memory that is overwritten when nobody reads it; and the point's snapshot."""

    epoch, step, seq, scheduled_lr = 2, 7, 30, None

    def __init__(self, size: int = SIZE, reached: int | None = None) -> None:
        self.header = HEADER
        self._memory = bytearray(DATA[:size])
        self.data = memoryview(self._memory)
        self.size = len(HEADER) + size
        self.whole = HEADER + DATA[:size]
        self.transport: FakeTransport | None = None
        self.is_referred_to: list[bool] = []
        """Whether the transport referred to the memory when it was released, for each reading."""
        self._reached = size if reached is None else reached

    @asynccontextmanager
    async def read(self, reading: Reading) -> AsyncIterator[Point]:
        try:
            yield self
        finally:
            if self.transport is not None:
                self.is_referred_to.append(any(isinstance(piece, memoryview) for piece in self.transport.buffer))
            self._memory[:] = bytes(len(self._memory))

    async def reach(self, size: int) -> None:
        if size > self._reached:
            raise MemoryError("the copy failed")

    def slices(self, begin: int, end: int) -> tuple[memoryview, memoryview]:
        split = len(self.header)
        return memoryview(self.header)[begin:end], self.data[max(begin - split, 0) : max(end - split, 0)]


def answer_with(
    point: Any, headers: dict[str, str] | None = None, stall_s: float = 30.0, patience: float = 0.0
) -> SnapshotResponse:
    reading = Reading("y", "F32", patience=patience)
    return SnapshotResponse(point, reading, stall_s, headers, lines=lambda step: {"Of-Step": str(step)})


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


@pytest.mark.parametrize("size", [0, 1, 1000, 512 * 1024 - 100, 512 * 1024, SIZE])
def test_a_point_with_its_headers(size: int) -> None:
    point = Point(size)
    answer = call(answer_with(point), scope_of("GET", "/"))
    assert (answer.status, answer.body, answer.is_complete) == (200, point.whole, True)
    expected = {
        "of-step": "7",
        "etag": '"e2-s7-y-F32"',
        "freestep-step": "7",
        "freestep-epoch": "2",
        "freestep-cut": "30",
        "accept-ranges": "bytes",
        "content-type": "application/vnd.safetensors",
        "content-length": str(point.size),
    }
    assert answer.headers == expected


@pytest.mark.parametrize("begin", [0, 1, 99, 100, 101, 1_000_000, SIZE - 300_000, SIZE + 99])
@pytest.mark.parametrize("end", [1, 100, 101, 600_000, SIZE - 1, SIZE + 100])
def test_any_range_of_a_point(begin: int, end: int) -> None:
    if begin >= end:
        return
    point = Point()
    answer = call(answer_with(point, {"range": f"bytes={begin}-{end - 1}"}), scope_of("GET", "/"))
    assert (answer.status, answer.body) == (206, point.whole[begin:end])
    assert answer.headers["content-range"] == f"bytes {begin}-{end - 1}/{point.size}"
    assert answer.headers["content-length"] == str(end - begin)


def test_an_answer_in_memory_is_counted_though_nobody_reads_its_head() -> None:
    class Memory:
        async def lay(self, point: Any) -> Span:
            return Span(0, point.size)

    async def gone(message: Any) -> None:
        raise ConnectionResetError

    async def work() -> None:
        point: Any = Point(1000)
        spent = list[int]()
        shared: Any = {"spend": spent.append, "memory": Memory()}
        answer = SnapshotResponse(point, Reading("y", "F32"), 30.0, **shared)
        with pytest.raises(ConnectionResetError):
            await answer(scope_of("GET", "/"), never, gone)
        assert spent == [point.size]

    async def never() -> Any:
        await asyncio.Event().wait()

    run(work)


@pytest.mark.parametrize("size", [400_000, SIZE])
@pytest.mark.parametrize("step", [10_000, 100_000, 10_000_000])
def test_a_transport_refers_to_no_memory_that_may_be_used_again(size: int, step: int) -> None:
    async def work() -> None:
        point = Point(size)
        transport = point.transport = FakeTransport(answer_with(point), reads=0)
        transport.feed(GET)
        await transport.turn()
        while transport.buffer:
            transport.read(step)
            await transport.turn()
        assert point.is_referred_to == [False]
        assert transport.written.endswith(b"\r\n\r\n" + point.whole)
        assert not transport.is_closing()
        transport.close()
        await transport.turn()

    run(work)


@pytest.mark.parametrize("reads", [0, 1, 1000, 1_500_000, SIZE - 300_000])
def test_a_client_that_stalls_is_cut_off_before_the_memory_is_used_again(
    reads: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        point, ended = Point(), asyncio.Event()
        response = answer_with(point, stall_s=0.01)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await response(scope, receive, send)
            ended.set()

        transport = point.transport = FakeTransport(app, reads)
        transport.feed(GET)
        await ended.wait()
        await transport.turn()
        assert transport.is_aborted
        assert point.is_referred_to == [False]
        assert len(transport.written) == reads
        _, _, body = bytes(transport.written).partition(b"\r\n\r\n")
        assert point.whole.startswith(body)

    run(work)
    (record,) = [each for each in caplog.records if each.name != "uvicorn.access"]
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert "GET /point" in record.getMessage()


def test_a_small_point_waits_for_a_slow_client_without_memory() -> None:
    async def work() -> None:
        points = [Point(400_000) for _ in range(3)]
        responses = [answer_with(point) for point in points]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await responses.pop(0)(scope, receive, send)

        transport = FakeTransport(app, reads=0)
        for point in points:
            point.transport = transport
        transport.feed(3 * GET)
        await transport.turn()
        assert [len(point.is_referred_to) for point in points[:2]] == [1, 1]
        while transport.buffer:
            transport.read(100_000)
            await transport.turn()
        assert [point.is_referred_to for point in points] == 3 * [[False]]
        assert all(point.whole in transport.written for point in points)
        transport.close()
        await transport.turn()

    run(work)


def test_an_answer_whose_copy_fails_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        point, ended = Point(reached=2_500_000), asyncio.Event()
        boundary = ErrorBoundary(answer_with(point), lambda _: ended.set())
        transport = point.transport = FakeTransport(boundary)
        transport.feed(GET)
        await ended.wait()
        await transport.turn()
        assert transport.is_aborted
        assert point.is_referred_to == [False]

    run(work)
    (record,) = [each for each in caplog.records if each.name != "uvicorn.access"]
    assert record.exc_info is not None and isinstance(record.exc_info[1], MemoryError)


def test_an_answer_that_the_shutdown_cancels_is_cut_off() -> None:
    async def work() -> None:
        point = Point()
        transport = point.transport = FakeTransport(ErrorBoundary(answer_with(point), lambda _: None), reads=1000)
        transport.feed(GET)
        await transport.turn()
        (task,) = transport.connection.tasks
        task.cancel()
        await transport.turn()
        assert transport.is_aborted
        assert point.is_referred_to == [False]

    run(work)


class Slow(Point):
    """A point that is never there."""

    @asynccontextmanager
    async def read(self, reading: Reading) -> AsyncIterator[Point]:
        await asyncio.Event().wait()
        yield self


def test_a_point_that_is_waited_for_is_waited_for_while_its_client_is_there() -> None:
    async def work() -> None:
        transport = FakeTransport(ErrorBoundary(answer_with(Slow(), patience=600.0), lambda _: None))
        transport.feed(GET)
        await transport.turn()
        transport.feed_eof()
        await transport.turn()
        assert not transport.connection.tasks

    run(work)


def test_a_point_that_is_waited_for_is_waited_for_until_the_shutdown() -> None:
    raised: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await answer_with(Slow(), patience=600.0)(scope, receive, send)
        except ShardUnavailable as error:
            raised.append(error)
            await Answer().send({"type": "http.response.start", "status": 503, "headers": []})

    async def work() -> None:
        transport = FakeTransport(app)
        transport.feed(GET)
        await transport.turn()
        transport.connection.shutdown()
        await transport.turn()
        assert len(raised) == 1

    run(work)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (None, None),
        ("", None),
        ("bytes=0-9", (0, 10)),
        ("bytes=0-0", (0, 1)),
        (" bytes=5- ", (5, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=99-5000", (99, 100)),
        ("bytes=-", None),
        ("bytes=9-3", None),
        ("bytes=0-1,5-6", None),
        ("bytes=a-b", None),
        ("bytes 0-1", None),
        ("lines=0-1", None),
        (f"bytes={'9' * 19}-", None),
    ],
)
def test_a_range_by_its_header(text: str | None, span: tuple[int, int] | None) -> None:
    assert parse_range(text, 100) == span


@pytest.mark.parametrize("text", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_past_the_end(text: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as refused:
        parse_range(text, 100)
    assert refused.value.extensions["size"] == 100


def test_a_range_counts_while_the_tag_is_the_one_named() -> None:
    asked = {"range": "bytes=1-2"}
    assert requested_span(asked, '"tag"', 100) == (1, 3)
    assert requested_span({**asked, "if-range": '"tag"'}, '"tag"', 100) == (1, 3)
    assert requested_span({**asked, "if-range": '"old"'}, '"tag"', 100) is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], False),
        ([""], False),
        (['"tag"'], True),
        (['"a", "tag"'], True),
        (['"a"', '"tag"'], True),
        (['W/"tag"'], True),
        (["*"], True),
        (['"a"'], False),
        (["tag"], False),
    ],
)
def test_a_tag_that_is_known(lines: list[str], expected: bool) -> None:
    headers = [(b"if-none-match", line.encode()) for line in lines]
    answer = not_modified(Request({"type": "http", "headers": headers}), {"ETag": '"tag"'})
    assert (answer is not None) is expected
    assert answer is None or (answer.status_code, answer.headers["etag"]) == (304, '"tag"')
