"""The transport of large bodies over TLS."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest
import trustme

from freestep.bulk import BulkTransport, pour
from freestep.bulk_exchange import Body
from meanwhile import DEADLINE_S, wait_for
from scripted import ANSWERS, LARGE, Peer, Server, Sink, assert_, post, poured


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def context(authority: trustme.CA) -> ssl.SSLContext:
    """A server's TLS context, with a certificate of the authority."""
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
        wait_for(is_heard, "the client has its answer")
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


def test_what_is_left_of_an_answer_over_tls_is_not_the_next_one(
    serve: Callable[..., Server], authority: trustme.CA, context: ssl.SSLContext
) -> None:
    def longer(peer: Peer) -> None:
        peer.head()
        # All of it in one record of TLS, and more than is read at once while a head may come.
        peer.send("HTTP/1.1 200 OK\r\nContent-Length: 8000\r\n\r\n" + 8000 * "a" + ANSWERS["length"])
        assert peer.ended()

    def next_one(peer: Peer) -> None:
        peer.head()
        peer.answer("next")

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = serve(longer, next_one, context=context).url
    with httpx.Client(transport=BulkTransport(verify=trusting), timeout=30) as http:
        assert poured(http, url, 8000) == 8000 * b"a"
        assert http.get(url).text == "next"


def test_a_server_that_takes_nothing_over_tls_is_waited_for_as_long_as_the_write_timeout(
    serve: Callable[..., Server], authority: trustme.CA, context: ssl.SSLContext
) -> None:
    over = threading.Event()
    server = serve(lambda peer: assert_(over.wait(DEADLINE_S)), context=context)
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
