"""Bytes as the service's connections read them, as h11 does, and as uvicorn's own protocol does.

Where two of them find a request, it is the same one; and it makes no difference where the bytes are cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import h11
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fake_transport import FakeTransport
from freestep_service.web.connection import Connection
from freestep_service.web.head import Bounds
from freestep_service.web.inlet import INLET
from fuzz.target import Target

__all__ = ["TARGET", "Found", "cut", "h11s", "ours", "uvicorns"]

Found = list[tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]]
"""Requests: method, target, headers but those of framing, and body."""

_BOUNDS = Bounds(small_bytes=16)
"""A body of more bytes goes the way of large ones."""
_MOST_CUTS = 8
_URL = re.compile(rb"^[A-Za-z]+://[^/?]*")
"""The part of a target in absolute form that the service does not look at."""
_FRAMING = (b"content-length", b"transfer-encoding")


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
        headers = _plain(scope["headers"])
        body, inlet = b"", scope.get("extensions", {}).get(INLET)
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
        self.found.append((scope["method"].encode(), scope["raw_path"] + query, headers, body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


def _plain(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value.strip()) for name, value in headers if name.lower() not in _FRAMING]


async def _exchange(
    app: App, pieces: Sequence[bytes], protocol: type[HttpToolsProtocol], bounds: Bounds | None = None
) -> bytes:
    """What a protocol answers to bytes in pieces, after which the peer ends its side."""
    transport = FakeTransport(app, protocol=protocol, bounds=bounds)
    for piece in pieces:
        transport.feed(piece)
        await transport.turn()
    transport.feed_eof()
    for _ in range(8):
        await transport.turn()
    transport.lose()
    await transport.turn()
    return bytes(transport.written)


def ours(pieces: Sequence[bytes]) -> tuple[Found, list[bytes]]:
    """The requests that a connection of the service runs, and the statuses that it answers with."""
    app = App()
    written = asyncio.run(_exchange(app, pieces, Connection, _BOUNDS))
    return app.found, re.findall(rb"HTTP/1\.1 ([2-9]\d\d) ", written)


def uvicorns(stream: bytes) -> Found:
    """The requests that uvicorn's protocol runs."""
    app = App()
    asyncio.run(_exchange(app, [stream], HttpToolsProtocol))
    return app.found


def _path_of(target: bytes) -> bytes:
    """What the service looks at of a target: its path, which a URL may lack, and its query."""
    path = _URL.sub(b"", target)
    return path if path.startswith(b"/") or path == target else b"/" + path


def h11s(stream: bytes) -> Found:
    """The requests that h11 reads, up to the first that it refuses or that ends the connection."""
    reader, found = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20), []
    reader.receive_data(stream)
    reader.receive_data(b"")
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Request):
                headers, body = _plain(list(event.headers)), b""
                method, target = event.method, _path_of(event.target)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((method, target, headers, body))
                reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                reader.send(h11.EndOfMessage())
                if reader.our_state is h11.MUST_CLOSE:
                    return found
                reader.start_next_cycle()
            else:
                return found
    except h11.ProtocolError:
        return found


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """A stream in the pieces between some places."""
    return [piece for begin, end in pairwise([0, *sorted(places), len(stream)]) if (piece := stream[begin:end])]


def check(data: bytes) -> None:
    """The first byte is the number of cuts; a byte for each says where; the rest is sent."""
    if not data:
        return
    number = data[0] % _MOST_CUTS
    cuts, stream = data[1 : 1 + number], data[1 + number :]
    found, statuses = ours([stream])
    for mine, other in zip(found, h11s(stream), strict=False):
        assert mine == other
    for (method, target, _, body), other in zip(found, uvicorns(stream), strict=False):
        # Its headers may have trailers among them.
        assert (method, target, body) == (other[0], other[1], other[3])
    assert not {b"500", b"502", b"503"} & set(statuses)
    assert ours(cut(stream, [len(stream) * place // 256 for place in cuts])) == (found, statuses)


_METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS"])
_TARGETS = st.sampled_from([b"/", b"/a?b=c", b"/%2e%2e/x", b"//two", b"/a;b", b"http://here", b"http://here?b=c"])
_VERSIONS = st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0"])
_ENDS = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\r\n"])
_ODD = [
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


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The framing of a body as a header, and the body."""
    content = draw(st.sampled_from([b"", b"abc", b"GET /in HTTP/1.1\r\nHost: a\r\n\r\n", bytes(40)]))
    kind = draw(st.sampled_from(["none", "length", "length", "chunks", "chunks", "wrong"]))
    if kind == "none":
        return b"", b""
    if kind != "chunks":
        return b"Content-Length: %d" % (len(content) + (kind == "wrong")), content
    place = draw(st.integers(0, len(content)))
    extension = draw(st.sampled_from([b"", b"", b";a=b", b' ;a="b"', b";\n"]))
    chunks = b"".join(
        b"%x%b\r\n%b\r\n" % (len(each), extension, each) for each in (content[:place], content[place:]) if each
    )
    trailer = draw(st.sampled_from([b"", b"", b"X: a\r\n", b"Content-Length: 9\r\n"]))
    return b"Transfer-Encoding: chunked", chunks + b"0\r\n" + trailer + b"\r\n"


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    framing, body = draw(_bodies())
    lines = [b"Host: here", framing, *draw(st.lists(st.sampled_from(_ODD), max_size=2))]
    first = b" ".join([draw(_METHODS), draw(_TARGETS), draw(_VERSIONS)])
    head = b"".join(line + draw(_ENDS) for line in [first, *draw(st.permutations(lines))] if line)
    return head + b"\r\n" + body


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Some requests, perhaps with a byte changed, and where they are cut."""
    stream = b"".join(draw(st.lists(_requests(), min_size=1, max_size=4)))
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(stream) - 1))
        change = draw(st.sampled_from([b"", b"\0", b" ", b"\n", b"\r\n", b":", b"\xff", b"1"]))
        stream = stream[:place] + change + stream[place + 1 :]
    cuts = draw(st.binary(max_size=_MOST_CUTS - 1))
    return bytes([len(cuts)]) + cuts + stream


_SEEDS = (
    b"\x01\x80POST /a HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\nGET /in HTTP/1.1\r\n\r\n"
    b"PUT /b HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: a\r\n\r\n"
    b"GET /c HTTP/1.1\r\nHost: here\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nGET /d HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x02\x20\x90GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 1,
    b"\x00POST / HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n" + bytes(40),
    b"\x03\x10\x40\x80GET http://here/x HTTP/1.0\r\n\r\nGET / HTTP/1.1\r\nHost: here\r\n\r\n",
)
_WORDS = (b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b",", b";", b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0", b"Host: a\r\n",
          b"CONNECT", b"PRI * HTTP/2.0", *_ODD)  # fmt: skip

TARGET = Target(check, _SEEDS, _WORDS, _streams())
