"""The transport of large bodies: against peers that answer byte by byte as they are told, and a real service."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
import pytest
import trustme

from freestep import Client
from freestep.bulk import Body, BulkTransport, direct_mounts, pour
from freestep.errors import MalformedTensors
from harness import ThreadService, at_once

LARGE = bytes(range(256)) * 256 * 1024
"""64 MB, which no socket's buffers hold."""


class Peer:
    """A server's end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def head(self) -> str:
        """The head of a request, and nothing behind it."""
        read = b""
        while not read.endswith(b"\r\n\r\n"):
            byte = self.connection.recv(1)
            assert byte, "the connection ended within the head"
            read += byte
        return read.decode("latin-1")

    def body(self, length: int) -> bytes:
        read = bytearray()
        while len(read) < length:
            part = self.connection.recv(min(length - len(read), 1 << 20))
            assert part, "the connection ended within the body"
            read += part
        return bytes(read)

    def send(self, text: str | bytes) -> None:
        self.connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)

    def answer(self, body: str = "", status: str = "200 OK", **headers: str) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n{body}")

    def ended(self) -> bool:
        """Whether the client has closed the connection; waits for that, or for more of it."""
        try:
            return not self.connection.recv(1)
        except OSError:
            return True

    def reset(self) -> None:
        """Has the connection end with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Script = Callable[[Peer], None]


class Server:
    """Lets each script talk over one connection, in turn, and closes that when the script returns."""

    def __init__(self, *scripts: Script, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._context = context
        self._over = [threading.Event() for _ in scripts]
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._talk, args=(scripts,))
        self._thread.start()

    def _talk(self, scripts: tuple[Script, ...]) -> None:
        for script, over in zip(scripts, self._over, strict=True):
            try:
                connection, _ = self._listener.accept()
                with connection:
                    if self._context is None:
                        script(Peer(connection))
                    else:
                        with self._context.wrap_socket(connection, server_side=True) as wrapped:
                            script(Peer(wrapped))
            except BaseException as error:
                self._failures.append(error)
            over.set()

    def wait_for(self, script: int) -> None:
        """Until a script has returned and its connection is closed."""
        self._over[script].wait()

    def close(self) -> None:
        self._thread.join(10)
        # Fails it where a connection that it waits for has never come.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self._failures:
            raise self._failures[0]


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*scripts: Script, **options: Any) -> Server:
        made.append(Server(*scripts, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(transport=BulkTransport(), timeout=30) as client:
        yield client


def assert_(condition: object) -> None:
    assert condition


class Sink:
    """Memory that a body is poured into."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self._rest = memoryview(self.memory)

    def get_buffer(self) -> memoryview:
        return self._rest

    def buffer_updated(self, size: int) -> None:
        self._rest = self._rest[size:]


def poured(http: httpx.Client, url: str, size: int) -> bytes:
    with http.stream("GET", url) as response:
        sink = Sink(size)
        pour(response, sink)
    return bytes(sink.memory)


def post(http: httpx.Client, url: str, *pieces: bytes, **options: Any) -> httpx.Response:
    body = Body([memoryview(piece) for piece in pieces])
    request = http.build_request("POST", url, content=body, headers={"Content-Length": str(body.length)}, **options)
    request.stream = body
    return http.send(request)


# What is sent, and how answers end


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
        assert peer.body(7) == b'{"a":1}'
        peer.answer()

    url = serve(script).url
    assert http.post(url, content=iter([b"ab", b"", b"cde"])).is_success
    assert http.post(url, json={"a": 1}).is_success


ANSWERS = {
    "length": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
    "chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n",
    "close": "HTTP/1.1 200 OK\r\n\r\n0123456789",
    "1.0": "HTTP/1.0 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
    "interim": "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
}


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


# Connections that end, or stay silent


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
    server = serve(lambda peer: assert_(over.wait()))
    with pytest.raises(httpx.WriteTimeout):
        post(http, server.url, LARGE, timeout=httpx.Timeout(30, write=0.05))
    over.set()


def test_a_server_that_shakes_no_hands_is_waited_for_as_long_as_the_connect_timeout(
    serve: Callable[..., Server], http: httpx.Client
) -> None:
    over = threading.Event()
    server = serve(lambda peer: assert_(over.wait()))
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


# Answers that come early


@pytest.mark.parametrize("together", [1, 2 * len(LARGE)])
@pytest.mark.parametrize("ending", ["keeps", "closes", "resets"])
def test_an_answer_that_comes_before_the_end_of_the_body_is_heard(
    serve: Callable[..., Server], http: httpx.Client, ending: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.bulk._TOGETHER", together)
    heard = threading.Event()

    def script(peer: Peer) -> None:
        peer.head()
        peer.body(100_000)
        peer.answer("too large", "413 Content Too Large")
        if ending == "resets":
            peer.reset()
        elif ending == "keeps":
            # Not sooner: who reads as fast as the client sends may have all before the client looks up.
            heard.wait()
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


# Which connections are kept


def test_a_connection_is_not_kept_when_the_server_says_so(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer("once", Connection="close")
        assert peer.ended()

    url = serve(script, script).url
    assert http.get(url).text == "once"
    assert poured(http, url, 4) == b"once"


def test_a_connection_with_something_left_on_it_is_not_kept(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.send(ANSWERS["length"] + "more")
        assert peer.ended()

    def unread(peer: Peer) -> None:
        peer.head()
        peer.send(ANSWERS["length"])
        assert peer.ended()

    url = serve(script, script, unread).url
    assert http.get(url).text == "0123456789"
    assert poured(http, url, 10) == b"0123456789"
    with http.stream("GET", url):
        pass


def test_no_more_idle_connections_are_kept_than_asked_for(serve: Callable[..., Server]) -> None:
    def kept(peer: Peer) -> None:
        for _ in range(2):
            peer.head()
            peer.answer()

    def ended(peer: Peer) -> None:
        peer.head()
        peer.answer()
        assert peer.ended()

    first, second = serve(ended), serve(kept)
    with httpx.Client(transport=BulkTransport(limits=httpx.Limits(max_keepalive_connections=1))) as http:
        for server in (first, second, second):
            assert http.get(server.url).is_success
        first.wait_for(0)
    for limits in (httpx.Limits(max_keepalive_connections=0), httpx.Limits(keepalive_expiry=-1)):
        with httpx.Client(transport=BulkTransport(limits=limits)) as http:
            server = serve(ended, ended)
            for number in range(2):
                assert http.get(server.url).is_success
                server.wait_for(number)


def test_a_hundred_threads_share_a_client(service: ThreadService) -> None:
    with Client(service.url, retry_for=0) as client:

        def ask() -> None:
            for _ in range(3):
                client.runs()

        at_once(*[ask] * 128)


# What httpx does with it


def test_a_client_says_who_it_is(serve: Callable[..., Server]) -> None:
    def script(peer: Peer) -> None:
        assert "\r\nAuthorization: Bearer secret\r\n" in (head := peer.head())
        assert "\r\nAccept-Encoding: identity\r\n" in head
        peer.answer('{"runs": []}', Content_Type="application/json")

    with Client(serve(script).url, token="secret") as client:
        assert client.runs() == []


def test_authentication_sends_the_body_again(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        assert "Authorization" not in peer.head()
        assert peer.body(len(LARGE)) == LARGE
        peer.answer("who?", "401 Unauthorized", WWW_Authenticate='Digest realm="r", nonce="n", qop="auth"')
        assert "\r\nAuthorization: Digest " in peer.head()
        assert peer.body(len(LARGE)) == LARGE
        peer.answer("you")

    http.auth = httpx.DigestAuth("name", "password")
    assert post(http, serve(script).url, LARGE).text == "you"


def test_hooks_are_called_and_cookies_kept(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer(Set_Cookie="taste=sweet")
        assert "\r\nCookie: taste=sweet\r\n" in peer.head()
        peer.answer()

    seen: list[str] = []
    http.event_hooks = {
        "request": [lambda request: seen.append(request.method)],
        "response": [lambda response: seen.append(response.reason_phrase)],
    }
    url = serve(script).url
    http.get(url)
    http.get(url)
    assert seen == ["GET", "OK", "GET", "OK"]


def test_redirects_are_followed_only_when_asked(serve: Callable[..., Server], http: httpx.Client) -> None:
    def script(peer: Peer) -> None:
        for _ in range(2):
            assert peer.head().startswith("POST / ")
            peer.body(4)
            peer.answer("", "307 Temporary Redirect", Location="/there")
        assert peer.head().startswith("POST /there ")
        assert peer.body(4) == b"body"
        peer.answer("there")

    url = serve(script).url
    assert post(http, url, b"body").status_code == 307
    http.follow_redirects = True
    assert post(http, url, b"body").text == "there"


def test_ipv6(serve: Callable[..., Server], http: httpx.Client) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")

    def script(peer: Peer) -> None:
        assert f"\r\nHost: [::1]:{server.port}\r\n" in peer.head()
        peer.answer("six")

    server = serve(script, host="::1")
    assert http.get(server.url).text == "six"


# TLS


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def context(authority: trustme.CA) -> ssl.SSLContext:
    """A server's, with a certificate of the authority."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(made)
    return made


def test_bodies_go_over_tls(serve: Callable[..., Server], authority: trustme.CA, context: ssl.SSLContext) -> None:
    def script(peer: Peer) -> None:
        for _ in range(2):
            peer.head()
            assert peer.body(len(LARGE)) == LARGE
            peer.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(LARGE)}\r\n\r\n".encode() + LARGE)

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = serve(script, context=context).url
    with httpx.Client(transport=BulkTransport(verify=trusting), timeout=30) as http:
        for _ in range(2):
            body = Body([memoryview(LARGE)])
            request = http.build_request("POST", url, content=body, headers={"Content-Length": str(body.length)})
            request.stream = body
            response = http.send(request, stream=True)
            sink = Sink(len(LARGE))
            pour(response, sink)
            response.close()
            assert sink.memory == LARGE


def test_a_refusal_over_tls_ends_the_body(
    serve: Callable[..., Server], authority: trustme.CA, context: ssl.SSLContext
) -> None:
    is_heard = threading.Event()
    read: list[int] = []

    def script(peer: Peer) -> None:
        peer.head()
        peer.answer("too large", "413 Content Too Large")
        assert is_heard.wait(60)
        with suppress(OSError):
            while size := len(peer.connection.recv(1 << 20)):
                read.append(size)

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    server = serve(script, context=context)
    with httpx.Client(transport=BulkTransport(verify=trusting), timeout=30) as http:
        assert post(http, server.url, LARGE, b"").status_code == 413
    is_heard.set()
    server.wait_for(0)
    assert sum(read) < len(LARGE)


def test_a_server_that_takes_nothing_over_tls_is_waited_for_as_long_as_the_write_timeout(
    serve: Callable[..., Server], authority: trustme.CA, context: ssl.SSLContext
) -> None:
    over = threading.Event()
    server = serve(lambda peer: assert_(over.wait()), context=context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with httpx.Client(transport=BulkTransport(verify=trusting)) as http, pytest.raises(httpx.WriteTimeout):
        post(http, server.url, LARGE, timeout=httpx.Timeout(30, write=0.05))
    over.set()


def test_a_certificate_of_a_stranger_is_not_trusted(
    serve: Callable[..., Server], http: httpx.Client, context: ssl.SSLContext
) -> None:
    def script(peer: Peer) -> None:
        with pytest.raises(ssl.SSLError, match="unknown ca"):
            context.wrap_socket(peer.connection, server_side=True)

    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        http.get(f"https://127.0.0.1:{serve(script).port}")


# Proxies


def test_a_proxy_of_the_environment_is_used(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def proxy(peer: Peer) -> None:
        assert peer.head().startswith("GET http://service.test/v1/runs HTTP/1.1\r\n")
        peer.answer('{"runs": []}')

    for name in ("ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", serve(proxy).url)
    with Client("http://service.test", retry_for=0) as client:
        assert client.runs() == []


@pytest.mark.parametrize(
    ("environment", "url", "is_direct"),
    [
        ({}, "http://a.test", True),
        ({"http_proxy": "http://127.0.0.1:1"}, "http://a.test", False),
        ({"http_proxy": "http://127.0.0.1:1"}, "https://a.test", True),
        ({"all_proxy": "http://127.0.0.1:1"}, "https://a.test", False),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": "*"}, "https://a.test", True),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": "b.test, a.test"}, "https://c.a.test", True),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": ".a.test"}, "https://a.test", False),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": "localhost"}, "http://localhost:8000", True),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": "localhost"}, "http://a.localhost:8000", False),
        ({"all_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}, "http://127.0.0.1:8000", True),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "::1"}, "http://[::1]:8000", True),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "http://a.test"}, "http://a.test", True),
    ],
)
def test_what_the_environment_names_no_proxy_for_is_asked_directly(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], url: str, is_direct: bool
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200)

    with httpx.Client(mounts=direct_mounts(httpx.MockTransport(note))) as http:
        try:
            http.get(url, timeout=0.001)
        except httpx.TransportError:
            assert not is_direct
    assert bool(asked) == is_direct
