"""The transport of large bodies: which connections are kept, and what httpx does with them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import httpx
import pytest

from freestep import Client, RunNotFound
from freestep.bulk import BulkTransport
from harness import ThreadService
from meanwhile import DEADLINE_S, at_once, under_way, wait_for
from scripted import ANSWERS, LARGE, Peer, Server, post, poured

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


def test_a_connection_that_is_dead_has_those_beside_it_forgotten(http: httpx.Client) -> None:
    is_over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def accepted() -> Peer:
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_S)
        return Peer(connection)

    def talk() -> None:
        peers = [accepted(), accepted()]
        for peer in peers:
            peer.head()
        for peer in peers:
            peer.answer("early")
        # From here on nobody answers on these, as where a router has forgotten them.
        fresh = accepted()
        fresh.head()
        fresh.answer("fresh")
        wait_for(is_over, "the client has its answer")
        for peer in [*peers, fresh]:
            peer.connection.close()

    talking = under_way(talk)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        at_once(*2 * [lambda: http.get(url)])
        with pytest.raises(httpx.ReadTimeout):
            http.get(url, timeout=httpx.Timeout(30, read=0.05))
        assert http.get(url, timeout=httpx.Timeout(30, read=5)).text == "fresh"
        is_over.set()
        talking.result()


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
                with pytest.raises(RunNotFound):
                    client.run("none").status()

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
