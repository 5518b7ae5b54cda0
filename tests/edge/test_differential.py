"""Bytes as the service's connections and as h11 read them: where both find a request, it is the same one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_transport import FakeTransport
from freestep_service.web import connection
from freestep_service.web.inlet import INLET

Found = list[tuple[bytes, bytes, bytes]]
"""Requests: method, target and body."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of more than 16 bytes are large."""
    monkeypatch.setattr(connection, "_SMALL", 16)


class Memory:
    """A sink without bounds."""

    def __init__(self) -> None:
        self.received = bytearray()
        self._buffer = bytearray(11)

    def get_buffer(self) -> memoryview:
        return memoryview(self._buffer)

    def buffer_updated(self, size: int) -> None:
        self.received += self._buffer[:size]


class App:
    """Answers requests whose bodies it has read as a whole, and keeps these."""

    def __init__(self) -> None:
        self.found: Found = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, inlet = b"", scope["extensions"].get(INLET)
        if inlet is not None:
            sink = Memory()
            try:
                await inlet.pour(sink, 10.0, asyncio.get_running_loop().time() + 10.0)
            except EOFError:
                return
            body = bytes(sink.received)
        else:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message["body"], message["more_body"]
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        self.found.append((scope["method"].encode(), scope["raw_path"] + query, body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


def ours(pieces: Sequence[bytes]) -> tuple[Found, list[bytes]]:
    """The requests that a connection runs, and the statuses that it answers with."""
    app = App()

    async def work() -> bytes:
        transport = FakeTransport(app)
        for piece in pieces:
            transport.feed(piece)
            await transport.turn()
        transport.feed_eof()
        for _ in range(8):
            await transport.turn()
        return bytes(transport.written)

    written = asyncio.run(work())
    return app.found, re.findall(rb"HTTP/1\.1 ([2-9]\d\d) ", written)


def theirs(stream: bytes) -> Found:
    """The requests that h11 reads, up to the first that it refuses or that ends the connection."""
    reader, found = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20), []
    reader.receive_data(stream)
    reader.receive_data(b"")
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Request):
                method, target, body = event.method, event.target, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((method, target, body))
                reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                reader.send(h11.EndOfMessage())
                if reader.our_state is h11.MUST_CLOSE:
                    return found
                reader.start_next_cycle()
            else:
                return found
    except h11.ProtocolError:
        return found


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS"])
TARGETS = st.sampled_from([b"/", b"/a?b=c", b"/%2e%2e/x", b"//two", b"/a;b"])
VERSIONS = st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0"])
ENDS = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\r\n"])
ODD = st.sampled_from(
    [
        b"Connection: close",
        b"Connection: keep-alive",
        b"Connection: upgrade\r\nUpgrade: h2c",
        b"Expect: 100-continue",
        b"Content-Length: 3",
        b"Content-Length: 0",
        b"Content-Length: 03",
        b"Content-Length: 3 ",
        b"Content-Length: 3, 3",
        b"Content-Length : 3",
        b"Content-Length: +3",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding:chunked ",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"X: a\r\n b",
        b"X: ",
        b"Host: there",
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The framing of a body as a header, and the body."""
    content = draw(st.sampled_from([b"", b"abc", b"GET /in HTTP/1.1\r\nHost: a\r\n\r\n", bytes(40)]))
    kind = draw(st.sampled_from(["none", "length", "length", "chunks", "chunks", "wrong"]))
    if kind == "none":
        return b"", b""
    if kind != "chunks":
        return b"Content-Length: %d" % (len(content) + (kind == "wrong")), content
    cut = draw(st.integers(0, len(content)))
    extension = draw(st.sampled_from([b"", b"", b";a=b", b' ;a="b"', b";\n"]))
    chunks = b"".join(
        b"%x%b\r\n%b\r\n" % (len(each), extension, each) for each in (content[:cut], content[cut:]) if each
    )
    trailer = draw(st.sampled_from([b"", b"", b"X: a\r\n", b"Content-Length: 9\r\n"]))
    return b"Transfer-Encoding: chunked", chunks + b"0\r\n" + trailer + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    framing, body = draw(bodies())
    lines = [b"Host: here", framing, *draw(st.lists(ODD, max_size=2))]
    first = b" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)])
    head = b"".join(line + draw(ENDS) for line in [first, *draw(st.permutations(lines))] if line)
    return head + b"\r\n" + body


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Some requests, perhaps with a byte changed, and where they are cut."""
    stream = b"".join(draw(st.lists(requests(), min_size=1, max_size=4)))
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(stream) - 1))
        change = draw(st.sampled_from([b"", b"\0", b" ", b"\n", b"\r\n", b":", b"\xff", b"1"]))
        stream = stream[:place] + change + stream[place + 1 :]
    return stream, draw(st.lists(st.integers(0, len(stream)), max_size=6))


@settings(max_examples=300, deadline=None)
@given(streams())
def test_both_find_the_same_requests_wherever_the_bytes_are_cut(sent: tuple[bytes, list[int]]) -> None:
    stream, cuts = sent
    found, statuses = ours([stream])
    assert all(mine == other for mine, other in zip(found, theirs(stream), strict=False))
    places = [0, *sorted(cuts), len(stream)]
    pieces = [stream[begin:end] for begin, end in pairwise(places)]
    assert ours([piece for piece in pieces if piece]) == (found, statuses)


WHOLE = (
    b"POST /a HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\nGET /in HTTP/1.1\r\n\r\n"
    b"PUT /b HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: a\r\n\r\n"
    b"GET /c HTTP/1.1\r\nHost: here\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nGET /d HTTP/1.1\r\nHost: a\r\n\r\n"
)


def test_every_cut_of_one_stream() -> None:
    expected = [(b"POST", b"/a", b"GET /in HTTP/1.1\r\n\r\n"), (b"PUT", b"/b", b"abc"), (b"GET", b"/c", b"")]
    assert theirs(WHOLE)[:3] == expected
    for cut in range(len(WHOLE) + 1):
        assert ours([piece for piece in (WHOLE[:cut], WHOLE[cut:]) if piece]) == (expected, [b"200"] * 3)
    assert ours([WHOLE[at : at + 1] for at in range(len(WHOLE))]) == (expected, [b"200"] * 3)
