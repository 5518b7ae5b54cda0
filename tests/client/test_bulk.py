"""The transport of large bodies: what is exchanged, and how broken connections are handled."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import httpx
import pytest

from freestep.bulk import BulkTransport, pour
from freestep.errors import MalformedTensors

# What is sent, and how answers end
from meanwhile import DEADLINE_S, wait_for
from scripted import ANSWERS, LARGE, Peer, Server, Sink, assert_, post, poured


@pytest.mark.parametrize("pieces", [[], [b""], [b"head", b"body"], [b"", b"a", b"b" * 70_000, b"c"], [b"head", LARGE]])
def test_a_body_arrives_as_it_lies(serve: Callable[..., Server], http: httpx.Client, pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    heads: list[str] = []

    def script(peer: Peer) -> None:
        for _ in range(2):
            heads.append(peer.head())
            assert peer.body(len(whole)) == whole
            peer.answer("thanks")

    server = serve(script)
    for _ in range(2):
        assert post(http, f"{server.url}/path?query=1", *pieces).text == "thanks"
    assert heads[0] == heads[1]
    assert heads[0].startswith(f"POST /path?query=1 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n")
    assert f"\r\nContent-Length: {len(whole)}\r\n" in heads[0]


def test_httpx_itself_sends_the_same_body(serve: Callable[..., Server]) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        assert peer.body(len(LARGE)) == LARGE
        peer.answer()

    with httpx.Client() as plain:
        assert post(plain, serve(script).url, LARGE).is_success


def test_other_content_is_sent_as_httpx_sends_it(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        assert "Transfer-Encoding: chunked" in peer.head()
        assert peer.body(20) == b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
        peer.answer()
        assert "Content-Type: application/json" in peer.head()
        assert peer.body(3) == b"[1]"
        peer.answer()

    url = serve(script).url
    assert http.post(url, content=iter([b"ab", b"", b"cde"])).is_success
    assert http.post(url, json=[1]).is_success


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("framing", ANSWERS)
def test_bodies_end_where_the_head_says(
    serve: Callable[..., Server], http: httpx.Client, framing: str, piece: int
) -> None:
    def script(peer: Peer, count: int) -> None:
        text = ANSWERS[framing]
        for _ in range(count):
            peer.head()
            for begin in range(0, len(text), piece):
                peer.send(text[begin : begin + piece])

    is_kept = framing in ("length", "chunked", "interim")
    scripts = [partial(script, count=2)] if is_kept else [partial(script, count=1)] * 2
    url = serve(*scripts).url
    assert http.get(url).text == "0123456789"
    assert poured(http, url, 10) == b"0123456789"


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")]
)
def test_what_has_no_body_needs_none(
    serve: Callable[..., Server], http: httpx.Client, method: str, status: str
) -> None:
    def script(peer: Peer) -> None:
        for _ in range(2):
            peer.head()
            peer.send(f"HTTP/1.1 {status}\r\nContent-Length: 10\r\n\r\n")

    url = serve(script).url
    assert http.request(method, url).content == b""
    with http.stream(method, url) as response:
        pour(response, Sink(10))


def test_a_large_answer_is_poured(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        for _ in range(2):
            peer.head()
            peer.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(LARGE)}\r\n\r\n".encode() + LARGE)

    url = serve(script).url
    assert poured(http, url, len(LARGE)) == LARGE
    assert http.get(url).content == LARGE


def test_a_sink_without_room_is_not_overrun(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer("0123456789")
        assert peer.ended()

    with pytest.raises(MalformedTensors, match="left over"):
        poured(http, serve(script).url, 9)


def test_an_answer_that_a_hook_has_read_is_poured_from_there(serve: Callable[..., Server]) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer("0123456789")

    seen: list[str] = []

    def hook(response: httpx.Response) -> None:
        response.read()
        seen.append(response.text)

    with httpx.Client(transport=BulkTransport(), event_hooks={"response": [hook]}) as http:
        assert poured(http, serve(script).url, 10) == b"0123456789"
    assert seen == ["0123456789"]


# Connections that end or stall


def test_a_connection_that_was_closed_meanwhile_is_not_used(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer()

    server = serve(script, script)
    assert http.get(server.url).is_success
    server.wait_for(0)
    assert post(http, server.url).is_success


@pytest.mark.parametrize("rest", ["", "HTTP/1.1 200 OK\r\nContent-Le"])
def test_an_answer_that_ends_within_its_head(serve: Callable[..., Server], http: httpx.Client, rest: str) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(rest)

    with pytest.raises(httpx.RemoteProtocolError, match="without an answer"):
        http.get(serve(script).url)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("ask", [httpx.Client.get, partial(poured, size=10)])
def test_an_answer_that_ends_within_its_body(
    serve: Callable[..., Server], http: httpx.Client, framing: str, ask: Callable[..., Any]
) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(ANSWERS[framing].partition("56789")[0])

    with pytest.raises(httpx.RemoteProtocolError):
        ask(http, serve(script).url)


@pytest.mark.parametrize("ask", [httpx.Client.get, partial(poured, size=10)])
def test_an_answer_that_is_reset(serve: Callable[..., Server], http: httpx.Client, ask: Callable[..., Any]) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(ANSWERS["length"][:-3])
        peer.reset()

    with pytest.raises(httpx.ReadError):
        ask(http, serve(script).url)


@pytest.mark.parametrize(
    "text",
    [
        "220 smtp.example ESMTP\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: " + 200_000 * "x",
    ],
)
def test_what_is_not_http_is_said_to_be_that(serve: Callable[..., Server], http: httpx.Client, text: str) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(text)
        assert peer.ended()

    with pytest.raises(httpx.RemoteProtocolError):
        http.get(serve(script).url)


@pytest.mark.parametrize("text", ["", "HTTP/1.1 200 OK\r\n", ANSWERS["length"][:-3], ANSWERS["chunked"][:-8]])
@pytest.mark.parametrize("ask", [httpx.Client.get, partial(poured, size=10)])
def test_a_silent_server_is_waited_for_as_long_as_the_read_timeout(
    serve: Callable[..., Server], http: httpx.Client, text: str, ask: Callable[..., Any]
) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(text)
        assert peer.ended()

    http.timeout = httpx.Timeout(30, read=0.05)
    with pytest.raises(httpx.ReadTimeout):
        ask(http, serve(script).url)


def test_a_server_that_takes_nothing_is_waited_for_as_long_as_the_write_timeout(
    serve: Callable[..., Server], http: httpx.Client
) -> None:
    over = threading.Event()
    server = serve(lambda peer: assert_(over.wait(DEADLINE_S)))
    with pytest.raises(httpx.WriteTimeout):
        post(http, server.url, LARGE, timeout=httpx.Timeout(30, write=0.05))
    over.set()


def test_a_server_that_shakes_no_hands_is_waited_for_as_long_as_the_connect_timeout(
    serve: Callable[..., Server], http: httpx.Client
) -> None:
    over = threading.Event()
    server = serve(lambda peer: assert_(over.wait(DEADLINE_S)))
    with pytest.raises(httpx.ConnectTimeout):
        http.get(f"https://127.0.0.1:{server.port}", timeout=httpx.Timeout(30, connect=0.05))
    over.set()


def test_nobody_there(http: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(httpx.ConnectError):
        http.get(url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "localhost:8000", "/path"])
def test_other_protocols_are_not_spoken(http: httpx.Client, url: str) -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        http.get(url)


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"Content-Length": "5"}])
def test_a_request_that_cannot_be_sent_is_not(
    serve: Callable[..., Server], http: httpx.Client, headers: Mapping[str, str]
) -> None:
    url = serve(lambda peer: assert_(peer.ended())).url
    with pytest.raises(httpx.LocalProtocolError):
        http.get(url, headers=headers)


# Responses that come before the request's end


@pytest.mark.parametrize("together", [1, 2 * len(LARGE)])
@pytest.mark.parametrize("ending", ["keeps", "closes", "resets"])
def test_an_answer_that_comes_before_the_end_of_the_body_is_heard(
    serve: Callable[..., Server], http: httpx.Client, ending: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.bulk_exchange._GATHERED", together)
    heard = threading.Event()

    def script(peer: Peer) -> None:
        peer.head()
        peer.body(100_000)
        peer.answer("too large", "413 Content Too Large")
        if ending == "resets":
            peer.reset()
        elif ending == "keeps":
            # Not sooner: a server that reads as fast as the client sends may have all before the client looks up.
            wait_for(heard, "the client has its answer")
            drained = 100_000
            while part := peer.connection.recv(1 << 20):
                drained += len(part)
            assert drained < len(LARGE)

    def then(peer: Peer) -> None:
        peer.head()
        peer.answer("fine")

    url = serve(script, then).url
    answer = post(http, url, LARGE)
    heard.set()
    assert (answer.status_code, answer.text) == (413, "too large")
    assert http.get(url).text == "fine"


def test_an_interim_answer_does_not_end_the_body(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send("HTTP/1.1 100 Continue\r\n\r\n")
        assert peer.body(len(LARGE)) == LARGE
        peer.answer("done")

    assert post(http, serve(script).url, LARGE).text == "done"


def test_a_server_that_leaves_within_the_body_has_not_answered(
    serve: Callable[..., Server], http: httpx.Client
) -> None:
    with pytest.raises(httpx.TransportError):
        post(http, serve(lambda peer: assert_(peer.body(100_000))).url, LARGE)
