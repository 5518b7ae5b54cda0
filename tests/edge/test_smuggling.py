"""What one reader could take for a body and another for a request is refused, and no part of it is run."""

from __future__ import annotations

import pytest

from edge.conftest import Edge
from freestep.wire.receiver import MEDIA_TYPE

LARGE = 100_000
"""Bytes of a body that goes the way of large ones."""

MALFORMED = {
    "length before chunks": "Content-Length: {size}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks before length": "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "chunks in capitals, and a length": "TRANSFER-ENCODING: CHUNKED\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "chunks and identity": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks twice": "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunks behind a tab": "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks behind a comma": "Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    "chunks behind another coding": "Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding like chunks, and a length": "Transfer-Encoding: xchunked\r\nContent-Length: {size}\r\n\r\n",
    "folded chunks": "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "chunks behind a NUL": "Transfer-Encoding: \0chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two equal lengths": "Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "two lengths": "Content-Length: 0\r\nContent-Length: {size}\r\n\r\n",
    "a list of lengths": "Content-Length: 0, {size}\r\n\r\n",
    "a signed length": "Content-Length: +0\r\n\r\n",
    "a negative length": "Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": "Content-Length: 0x0\r\n\r\n",
    "a length with an underscore": "Content-Length: 0_0\r\n\r\n",
    "a length of two words": "Content-Length: 0 {size}\r\n\r\n",
    "an empty length": "Content-Length:\r\n\r\n",
    "a length behind a NUL": "Content-Length\0: {size}\r\n\r\n",
    "a raised length": "Content-Length: \xb2\r\n\r\n",
    "a length beyond 64 bits": "Content-Length: 18446744073709551616\r\n\r\n",
    "a folded header": "X-Folded: a\r\n Content-Length: {size}\r\n\r\n",
    "a folded length": "Content-Length:\r\n 0\r\n\r\n",
    "white space before the first field": " X-First: a\r\n\r\n",
    "a space before the colon": "Content-Length : {size}\r\n\r\n",
    "a tab before the colon": "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    "no colon": "X-None\r\n\r\n",
    "no name": ": {size}\r\n\r\n",
    "a bare LF behind a field": "X-Bare: a\nContent-Length: {size}\r\n\r\n",
    "a bare CR within a field": "X-Bare: a\rContent-Length: {size}\r\n\r\n",
    "a bare LF at the end": "X-Bare: a\n\r\n",
    "a NUL in a field": "X-Nul: a\0b\r\n\r\n",
    "a NUL in a name": "X-\0Nul: b\r\n\r\n",
    "two hosts": "Host: there\r\n\r\n",
    "an upgrade with a length": "Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {size}\r\n\r\n",
    "an upgrade to websocket": "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: {size}\r\n\r\n",
    "an upgrade among others": "Connection: keep-alive, upgrade\r\nUpgrade: x, y\r\nContent-Length: {size}\r\n\r\n",
    "an upgrade with chunks": "Connection: upgrade\r\nUpgrade: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}
CHUNKS = {
    "an LF behind a size": "0\n\r\n",
    "an LF in an extension": "0;a\n\r\n\r\n",
    "an LF behind a quoted extension": '0;a="\n"\r\n\r\n',
    "a CR in an extension": "0;a\rb\r\n\r\n",
    "a size in 0x": "0x0\r\n\r\n",
    "a signed size": "-0\r\n\r\n",
    "a size with an underscore": "0_0\r\n\r\n",
    "a space before a size": " 0\r\n\r\n",
    "an endless size": "FFFFFFFFFFFFFFFFF\r\n",
    "no size": "\r\n\r\n",
    "bytes behind a chunk": "1\r\nab\r\n0\r\n\r\n",
    "an LF behind a chunk": "1\r\na\n0\r\n\r\n",
    "a CR behind a CR": "0\r\r\n\r\n",
    "an LF at the end": "0\r\n\n",
    "a chunk longer than its bytes": "3\r\na\r\n0\r\n\r\n",
    "a trailer with a space": "0\r\nX : a\r\n\r\n",
    "a folded trailer": "0\r\nX: a\r\n b\r\n\r\n",
}


def smuggled(edge: Edge) -> bytes:
    """A request that would end the run."""
    return edge.head("DELETE") + b"\r\n"


def is_untouched(edge: Edge, before: object) -> bool:
    return edge.api.status() == before


@pytest.mark.parametrize("at_once", [True, False], ids=["one segment", "two segments"])
@pytest.mark.parametrize("form", MALFORMED, ids=MALFORMED)
def test_a_head_of_two_meanings_is_refused_with_all_behind_it(edge: Edge, form: str, at_once: bool) -> None:
    before, behind = edge.api.status(), smuggled(edge)
    version = "HTTP/1.0" if form.endswith("1.0") else "HTTP/1.1"
    for method, path in (("POST", "/leases"), ("POST", "/gradients"), ("GET", ""), ("DELETE", "")):
        sent = edge.head(method, path, version=version) + MALFORMED[form].format(size=len(behind)).encode("latin-1")
        with edge.peer() as peer:
            peer.send(*([sent + behind] if at_once else [sent, behind]))
            (answer,) = peer.answers()
            assert answer.status in (400, 501), answer
            assert answer.headers["connection"] == "close"
            assert is_untouched(edge, before)


@pytest.mark.parametrize("form", CHUNKS, ids=CHUNKS)
def test_chunks_of_two_meanings_are_refused_with_all_behind_them(edge: Edge, form: str) -> None:
    before = edge.api.status()
    # The last two do not read a body.
    for method, path in (("PUT", ""), ("POST", "/leases"), ("POST", "/reshard"), ("DELETE", ""), ("GET", "")):
        head = edge.head(method, path, "Content-Type: application/json", "Transfer-Encoding: chunked")
        with edge.peer() as peer:
            peer.send(head + b"\r\n" + CHUNKS[form].encode() + smuggled(edge))
            (answer,) = peer.answers()
            assert answer.status == 400, answer
            assert is_untouched(edge, before)


@pytest.mark.parametrize("coding", ["identity", "gzip", "gzip, chunked", "chunked;q=1", "chunked, gzip", "x"])
def test_a_body_in_another_coding_is_refused(edge: Edge, coding: str) -> None:
    before = edge.api.status()
    with edge.peer() as peer:
        peer.send(edge.head("DELETE", "", f"Transfer-Encoding: {coding}") + b"\r\n0\r\n\r\n" + smuggled(edge))
        (answer,) = peer.answers()
        assert answer.status in (400, 501)
        assert is_untouched(edge, before)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("protocol", ["h2c", "websocket", "HTTP/2.0", "x"])
def test_an_upgrade_without_a_body_is_ignored_and_the_connections_last(
    edge: Edge, protocol: str, at_once: bool
) -> None:
    before = edge.api.status()
    head = edge.head("GET", "", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAM")
    with edge.peer() as peer:
        peer.send(*([head + b"\r\n" + smuggled(edge)] if at_once else [head + b"\r\n", smuggled(edge)]))
        (answer,) = peer.answers()
        assert (answer.status, answer.document["run"]) == (200, edge.api.run)
    assert is_untouched(edge, before)


def test_a_method_that_opens_a_tunnel_is_refused(edge: Edge) -> None:
    before = edge.api.status()
    for target in ("here:80", edge.api.path(), "/"):
        with edge.peer() as peer:
            peer.send(f"CONNECT {target} HTTP/1.1\r\nHost: here\r\n\r\n".encode(), smuggled(edge))
            (answer,) = peer.answers()
            assert answer.slug == "malformed-request"
    assert is_untouched(edge, before)


@pytest.mark.parametrize(
    ("path", "media_type", "length"),
    [
        ("/leases", "application/json", 200),
        ("/leases", MEDIA_TYPE, LARGE),
        ("/gradients", MEDIA_TYPE, 200),
        ("/gradients", MEDIA_TYPE, LARGE),
        ("/gradients", "text/plain", LARGE),
        ("/gradients?shard=9", MEDIA_TYPE, LARGE),
        ("/nothing", MEDIA_TYPE, LARGE),
    ],
)
def test_the_body_of_a_refused_request_is_no_request(edge: Edge, path: str, media_type: str, length: int) -> None:
    before, requests = edge.api.status(), smuggled(edge)
    body = (requests * (length // len(requests) + 1))[:length]
    head = edge.head("POST", path, f"Content-Type: {media_type}", f"Content-Length: {length}")
    with edge.peer() as peer:
        for _ in range(2):
            peer.send(head + b"\r\n", body[:50], body[50:])
            assert 400 <= peer.answer().status < 500
            # It is behind the body that the next request begins.
            peer.send(edge.head("GET") + b"\r\n")
            assert peer.answer().document["run"] == edge.api.run
    assert is_untouched(edge, before)


@pytest.mark.parametrize("edge", ["http", "https"], indirect=True)
@pytest.mark.parametrize(
    "expectation",
    ["100-continue", "100-Continue", "100-continue ", "\t100-continue\t", "x, 100-continue", "100-continue ,x"],
)
@pytest.mark.parametrize("length", [200, LARGE])
def test_nobody_takes_a_request_for_a_body_that_was_not_asked_for(edge: Edge, length: int, expectation: str) -> None:
    """A proxy that is refused a go-ahead may keep the body to itself, and send the next request."""
    before = edge.api.status()
    lines = [f"Content-Type: {MEDIA_TYPE}", f"Content-Length: {length}", f"Expect: {expectation}"]
    with edge.peer() as peer:
        peer.send(edge.head("POST", "/gradients", *lines) + b"\r\n" + smuggled(edge))
        (answer,) = peer.answers()
        assert answer.slug == "malformed-request"
    assert is_untouched(edge, before)


@pytest.mark.parametrize("first", ["GET {} HTTP/1.1\n", "GET {} HTTP/1.1\r", "GET\t{} HTTP/1.1\r\n"])
def test_a_request_line_ends_and_is_spaced_as_it_has_to_be(edge: Edge, first: str) -> None:
    before = edge.api.status()
    with edge.peer() as peer:
        peer.send(first.format(edge.api.path()).encode() + b"Host: here\r\n\r\n" + smuggled(edge))
        (answer,) = peer.answers()
        assert answer.status == 400
    assert is_untouched(edge, before)


@pytest.mark.parametrize("named", ["content-length", "authorization", "host", "close, content-length"])
def test_a_header_of_one_hop_moves_no_body(edge: Edge, named: str) -> None:
    before, body = edge.api.status(), smuggled(edge)
    lines = ["Content-Type: application/json", f"Content-Length: {len(body)}", f"Connection: {named}"]
    with edge.peer() as peer:
        peer.send(edge.head("POST", "/leases", *lines) + b"\r\n" + body)
        assert 400 <= peer.answer().status < 500
    assert is_untouched(edge, before)


@pytest.mark.parametrize(
    "field", ["Freestep-Relayed: 1", "Content-Type: text/plain", "Host: there", "Idempotency-Key: other"]
)
def test_trailers_are_no_headers(edge: Edge, field: str) -> None:
    head = edge.head("POST", "/leases", "Content-Type: application/json", "Transfer-Encoding: chunked")
    body = b'{"worker": "trailing"}'
    with edge.peer() as peer:
        peer.send(head + b"\r\n%x;extension=1\r\n%b\r\n0;more\r\n%b\r\n\r\n" % (len(body), body, field.encode()))
        lease = peer.answer().document["lease"]
        peer.send(edge.head("GET") + b"\r\n")
        assert [each["worker"] for each in peer.answer().document["workers"]] == ["trailing"]
        peer.send(edge.head("DELETE", f"/leases/{lease}") + b"\r\n")
        assert peer.answer("DELETE").status == 204


def test_what_follows_the_last_request_of_a_connection_is_not_run(edge: Edge) -> None:
    before = edge.api.status()
    for method, path, length in (("GET", "", 0), ("POST", "/gradients", 9), ("POST", "/gradients", LARGE)):
        lines = [f"Content-Type: {MEDIA_TYPE}", f"Content-Length: {length}", "Connection: close"]
        with edge.peer() as peer:
            peer.send(edge.head(method, path, *lines) + b"\r\n" + bytes(length) + smuggled(edge))
            assert len(peer.answers()) == 1
    assert is_untouched(edge, before)
