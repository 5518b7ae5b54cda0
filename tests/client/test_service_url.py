"""URLs of services that lack something, and servers that speak the other one of http and https."""

from __future__ import annotations

import ssl
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import forked
from freestep import Client, InvalidSetting, ServiceUnreachable, UnexpectedResponse
from harness import ThreadService
from scripted import Peer, Server


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("host/path", "http://host/path"),
        ("host", "http://host"),
        ("//host:8000", "http://host:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http:/host:8000", "http://host:8000"),
        ("https:host", "https://host"),
        ("host:443", "https://host:443"),
    ],
)
def test_a_url_without_its_scheme_is_refused_with_the_one_that_was_meant(url: str, meant: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Client(url)
    assert isinstance(caught.value, ValueError)
    assert repr(url) in str(caught.value)
    assert f"perhaps {meant} is meant" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host:0",
        "http://[::1",
        "http://host/?run=1",
        "http://h#x",
        ":",
    ],
)
def test_what_is_no_url_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="is not"):
        Client(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://user:secret/more@host", "must be %-encoded"),
        ("http://user:secret#more@host:8000", "must be %-encoded"),
        ("http://user:secret://more@host:x", "Invalid port: 'x'"),
        ("user:secret://more@host", "it must begin with http"),
        ("http://user:secret@host:x", "Invalid port: 'x'"),
    ],
)
def test_no_part_of_a_password_is_shown(url: str, why: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Client(url)
    assert why in str(caught.value)
    # What it was raised from is shown too.
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_path_and_a_slash_at_the_end_belong_to_a_url() -> None:
    for url in ("http://host:8000/", "https://host/freestep/", "HTTP://Host"):
        Client(url).close()


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_command_refuses_it_too(how: str) -> None:
    given = {"FREESTEP_URL": "localhost:8000"} if how == "variable" else {}
    option = ["--url", "localhost:8000"] if how == "option" else []
    done = forked.freestep("runs", "list", *option, **given)
    assert done.returncode == 2
    assert "perhaps http://localhost:8000 is meant" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# The other scheme


def test_http_at_an_https_port_is_said(tls_service: ThreadService) -> None:
    plain = tls_service.url.replace("https", "http")
    with Client(plain, retry_for=3600) as client, pytest.raises(ServiceUnreachable) as caught:
        client.runs()
    assert str(caught.value) == f"the server at {plain} speaks https: use the URL {tls_service.url}"


def test_https_at_an_http_port_is_said(service: ThreadService) -> None:
    secure = service.url.replace("http", "https")
    with Client(secure, retry_for=3600) as client, pytest.raises(ServiceUnreachable) as caught:
        client.runs()
    assert str(caught.value) == f"the server at {secure} speaks http: use the URL {service.url}"


def test_http_at_an_https_port_that_answers_it_is_said(serve: Callable[..., Server], tls: dict[str, Path]) -> None:
    """As nginx does: 400, in plain text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls["ssl_certfile"], tls["ssl_keyfile"])

    def plainly(peer: Peer) -> None:
        peer.head()
        peer.answer("The plain HTTP request was sent to HTTPS port", "400 Bad Request", Connection="close")

    def securely(peer: Peer) -> None:
        with context.wrap_socket(peer.connection, server_side=True) as wrapped:
            wrapped.recv(1)

    server = serve(plainly, securely)
    with Client(server.url, retry_for=3600) as client, pytest.raises(ServiceUnreachable, match="speaks https: use"):
        client.runs()


def test_a_server_that_speaks_neither_is_not_said_to(serve: Callable[..., Server]) -> None:
    def silent(peer: Peer) -> None:
        peer.head()

    def no_tls(peer: Peer) -> None:
        peer.connection.recv(1)
        peer.send("what?")

    with Client(serve(silent, no_tls).url, retry_for=0) as client, pytest.raises(ServiceUnreachable) as caught:
        client.runs()
    assert "speaks" not in str(caught.value)


def test_a_server_that_has_answered_once_is_not_doubted(serve: Callable[..., Server]) -> None:
    def first(peer: Peer) -> None:
        peer.head()
        peer.answer("{}", Content_Type="application/json")
        peer.head()

    # A second connection would fail the test.
    with Client(serve(first).url, retry_for=0) as client:
        with pytest.raises(UnexpectedResponse):
            client.runs()
        with pytest.raises(ServiceUnreachable, match="closed the connection"):
            client.runs()
