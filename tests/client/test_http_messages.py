"""HTTP/1.1 messages as bytes: what h11 makes of the same, and what is no message."""

from __future__ import annotations

from collections.abc import Iterator

import h11
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freestep.bulk_exchange import Body
from freestep.http_messages import AnswerReader, framed, request_head
from freestep.service_transport import open_transport
from scripted import ANSWERS

HEADERS = [(b"Host", b"a:1"), (b"X-Empty", b""), (b"Freestep-Step", b"7"), (b"X", b"caf\xe9 \t of two")]


def fed(answer: AnswerReader, text: str | bytes, piece: int = 1000) -> Iterator[bytes]:
    """The body of an answer that comes in pieces."""
    whole = text.encode() if isinstance(text, str) else text
    for begin in range(0, len(whole), piece):
        answer.feed(whole[begin : begin + piece])
        yield from answer.take()


# Requests


def test_a_head_is_that_of_h11() -> None:
    twin = h11.Connection(h11.CLIENT).send(h11.Request(method=b"POST", target=b"/a?b=%20", headers=HEADERS))
    assert request_head(b"POST", b"/a?b=%20", HEADERS) == twin


@given(st.binary(max_size=12), st.binary(max_size=12), st.booleans())
def test_what_h11_refuses_in_a_head_is_refused(name: bytes, value: bytes, is_target: bool) -> None:
    headers = [(b"Host", b"a"), *([] if is_target else [(name, value)])]
    target, twin = value if is_target else b"/", None
    try:
        twin = h11.Connection(h11.CLIENT).send(h11.Request(method=b"GET", target=target, headers=headers))
    except h11.LocalProtocolError as error:
        # What names mean is httpx's to care for.
        if "Illegal" in str(error) or "illegal" in str(error):
            with pytest.raises(httpx.LocalProtocolError) as refused:
                request_head(b"GET", target, headers)
            assert len(value) < 3 or repr(value) not in str(refused.value)
    # h11 lets control characters pass, but for line ends and zeros; RFC 9110, section 5.5, does not.
    if twin is not None and not any(byte < 0x20 or byte == 0x7F for byte in value):
        assert request_head(b"GET", target, headers).lower() == twin.lower()


@pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a: b", b"a\r\nb"])
def test_a_name_is_one(name: bytes) -> None:
    with pytest.raises(httpx.LocalProtocolError):
        request_head(b"GET", b"/", [(name, b"v")])


@pytest.mark.parametrize(
    ("length", "pieces", "refusal"),
    [(b"4", [b"abc"], "little"), (b"4", [b"abc", b"de"], "much"), (None, [b"a"], "much")],
)
def test_a_body_has_the_length_of_its_head(length: bytes | None, pieces: list[bytes], refusal: str) -> None:
    headers = [] if length is None else [(b"content-length", length)]
    with pytest.raises(httpx.LocalProtocolError, match=refusal):
        list(framed(pieces, headers))


# Answers


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("framing", ANSWERS)
def test_an_answer_is_read_as_it_comes(framing: str, piece: int) -> None:
    answer = AnswerReader("GET")
    assert b"".join(fed(answer, ANSWERS[framing], piece)) == b"0123456789"
    assert (answer.status, answer.reason, answer.version) == (200, b"OK", b"1.0" if framing == "1.0" else b"1.1")
    assert answer.is_complete == (framing != "close")
    if not answer.is_complete:
        answer.end()
        assert answer.is_complete
    assert answer.is_last == (framing in ("close", "1.0"))


def test_the_headers_are_those_of_the_answer() -> None:
    answer = AnswerReader("GET")
    list(
        fed(
            answer,
            "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 Fine\r\nETag: b\r\nContent-Length: 0\r\n\r\n",
        )
    )
    assert answer.headers == [(b"ETag", b"b"), (b"Content-Length", b"0")]
    assert (answer.reason, answer.is_complete, answer.is_last) == (b"Fine", True, False)


def test_a_body_that_is_not_fed_is_counted() -> None:
    answer = AnswerReader("GET")
    assert list(fed(answer, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123")) == [b"0123"]
    assert (answer.missing, answer.is_complete) == (6, False)
    answer.received(6)
    assert (answer.missing, answer.is_complete, answer.is_last) == (0, True, False)


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_what_has_no_body_is_complete_with_its_head(method: str, status: int) -> None:
    answer = AnswerReader(method)
    assert not list(fed(answer, f"HTTP/1.1 {status} OK\r\nContent-Length: 10\r\n\r\n"))
    assert (answer.missing, answer.is_complete, answer.is_last) == (0, True, False)


@pytest.mark.parametrize("piece", [1, 1000])
@pytest.mark.parametrize("more", ["m", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_more_than_an_answer_ends_the_connection(framing: str, more: str, piece: int) -> None:
    answer = AnswerReader("GET")
    assert b"".join(fed(answer, ANSWERS[framing] + more, piece)) == b"0123456789"
    assert (answer.status, answer.is_complete, answer.is_last) == (200, True, True)
    assert all(name in (b"Content-Length", b"Transfer-Encoding") for name, _ in answer.headers)


@pytest.mark.parametrize("end", [0, 10, -12, -3])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_answer_that_ends_early_is_none(framing: str, end: int) -> None:
    answer = AnswerReader("GET")
    list(fed(answer, ANSWERS[framing][:end]))
    with pytest.raises(httpx.RemoteProtocolError):
        answer.end()


@pytest.mark.parametrize(
    "text",
    [
        "220 smtp.example ESMTP\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: " + 200_000 * "x",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
@pytest.mark.parametrize("piece", [1, 1000])
def test_what_is_not_http_is_refused(text: str, piece: int) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        list(fed(AnswerReader("GET"), text, piece))


@given(st.binary(max_size=60), st.integers(1, 60))
def test_no_bytes_raise_anything_else(junk: bytes, piece: int) -> None:
    for text in (junk, b"HTTP/1.1 200 OK\r\n" + junk, ANSWERS["chunked"].encode()[:46] + junk):
        answer = AnswerReader("GET")
        try:
            list(fed(answer, text, piece))
            answer.end()
        except httpx.RemoteProtocolError:
            pass


# The requests of a client


def test_a_request_is_the_one_that_httpx_would_make() -> None:
    http = open_transport("https://name.example:8443", "secret", True, 30.0, 0.0)._http
    lines = {"Accept-Encoding": "identity", "Content-Length": "3", "Idempotency-Key": "k"}
    body, timeout = Body([memoryview(b"abc")]), httpx.Timeout(30.0, connect=3.0)
    url = httpx.URL("https://name.example:8443/v1/runs/r/gradients?shard=0")
    made = http.build_request("POST", url, content=body, headers=lines, timeout=timeout, json=None, params=None)
    twin = httpx.Client.build_request(http, "POST", url, content=b"abc", headers=lines, timeout=timeout)
    assert (made.method, made.url, made.stream) == (twin.method, twin.url, body)
    assert sorted(made.headers.multi_items()) == sorted(twin.headers.multi_items())
    assert made.extensions == twin.extensions
    http.cookies.set("taste", "sweet")
    with_cookie = http.build_request("POST", url, content=body, headers=lines, timeout=timeout)
    assert with_cookie.headers["cookie"] == "taste=sweet"
