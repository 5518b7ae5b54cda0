"""Bytes as the service's connections read them, wherever they are cut; others are made by the fuzz target."""

from __future__ import annotations

from fuzz.connection import cut, h11s, ours, uvicorns

HOST = (b"host", b"here")
WHOLE = (
    b"POST /a HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\nGET /in HTTP/1.1\r\n\r\n"
    b"PUT /b HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: a\r\n\r\n"
    b"GET /c HTTP/1.1\r\nHost: here\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nGET /d HTTP/1.1\r\nHost: a\r\n\r\n"
)
FOUND = [
    (b"POST", b"/a", [HOST], b"GET /in HTTP/1.1\r\n\r\n"),
    (b"PUT", b"/b", [HOST], b"abc"),
    (b"GET", b"/c", [HOST, (b"connection", b"upgrade"), (b"upgrade", b"h2c")], b""),
]


def test_every_cut_of_one_stream() -> None:
    for place in range(len(WHOLE) + 1):
        assert ours(cut(WHOLE, [place])) == (FOUND, [b"200"] * 3)
    assert ours(cut(WHOLE, range(len(WHOLE)))) == (FOUND, [b"200"] * 3)


def test_others_find_these_requests_and_more() -> None:
    """What follows an upgrade is none of ours."""
    assert h11s(WHOLE)[:3] == FOUND
    assert [each[:2] for each in uvicorns(WHOLE)][:3] == [each[:2] for each in FOUND]
