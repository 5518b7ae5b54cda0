"""Proxies that the environment names, and what it exempts from them."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping

import httpx
import pytest
import torch

import forked
from freestep import Client, Flat, InvalidSetting, ServiceUnreachable, UnexpectedResponse
from freestep.proxies import EnvironmentTransport
from harness import ThreadService
from proxies import Cutter
from scripted import Peer, Server

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
DEAD = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


def test_a_proxy_is_asked(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def proxy(peer: Peer) -> None:
        assert peer.head().startswith("GET http://service.test/v1/runs HTTP/1.1\r\n")
        peer.answer('{"runs": []}')

    monkeypatch.setenv("http_proxy", serve(proxy).url)
    with Client("http://service.test", retry_for=0) as client:
        assert client.runs() == []


ALL = {"all_proxy": DEAD}


@pytest.mark.parametrize(
    ("environment", "url", "is_direct"),
    [
        ({}, "http://a.test", True),
        ({"http_proxy": DEAD}, "http://a.test", False),
        ({"http_proxy": DEAD}, "https://a.test", True),
        ({"https_proxy": DEAD}, "https://a.test", False),
        (ALL, "https://a.test", False),
        (ALL, "http://127.0.0.1:8000", False),
        ({**ALL, "no_proxy": "*"}, "https://a.test", True),
        ({**ALL, "no_proxy": "b.test, a.test"}, "https://c.a.test", True),
        ({**ALL, "no_proxy": "b.test a.test"}, "https://a.test", True),
        ({**ALL, "no_proxy": "a.test"}, "https://ba.test", False),
        ({**ALL, "no_proxy": ".a.test"}, "https://a.test", True),
        ({**ALL, "no_proxy": "*.a.test"}, "https://b.a.test", True),
        ({**ALL, "no_proxy": "A.Test."}, "https://a.test", True),
        ({**ALL, "no_proxy": "a.test:8000"}, "http://a.test:8000", True),
        ({**ALL, "no_proxy": "a.test:8000"}, "http://a.test:8001", False),
        ({**ALL, "no_proxy": "a.test:443"}, "https://a.test", True),
        ({**ALL, "no_proxy": "localhost"}, "http://localhost:8000", True),
        ({**ALL, "no_proxy": "localhost"}, "http://127.0.0.1:8000", False),
        ({**ALL, "no_proxy": "127.0.0.1"}, "http://127.0.0.1:8000", True),
        ({**ALL, "no_proxy": "127.0.0.1:8000"}, "http://127.0.0.1:8000", True),
        ({**ALL, "no_proxy": "10.0.0.0/8"}, "http://10.1.2.3:8000", True),
        ({**ALL, "no_proxy": "10.0.0.0/8"}, "http://11.1.2.3:8000", False),
        ({**ALL, "no_proxy": "10.1.2.3/8"}, "http://10.9.9.9", True),
        ({**ALL, "no_proxy": "10.0.0.0/8"}, "http://a.test", False),
        ({"http_proxy": DEAD, "no_proxy": "::1"}, "http://[::1]:8000", True),
        ({"http_proxy": DEAD, "no_proxy": "[::1]"}, "http://[::1]:8000", True),
        ({"http_proxy": DEAD, "no_proxy": "[::1]:8000"}, "http://[::1]:8000", True),
        ({"http_proxy": DEAD, "no_proxy": "[::1]:8001"}, "http://[::1]:8000", False),
        ({"http_proxy": DEAD, "no_proxy": "0:0::1"}, "http://[::1]:8000", True),
        ({"http_proxy": DEAD, "no_proxy": "fd00::/8"}, "http://[fd12::7]:8000", True),
        ({"http_proxy": DEAD, "no_proxy": "fd00::/8"}, "http://[fe80::7]:8000", False),
        ({"http_proxy": DEAD, "no_proxy": "fd00::/8, 10.0.0.0/8"}, "http://10.0.0.1", True),
        ({"http_proxy": DEAD, "no_proxy": "http://a.test"}, "http://a.test", True),
        ({**ALL, "no_proxy": "http://a.test"}, "https://a.test", False),
        ({**ALL, "no_proxy": "[::, :8000, //"}, "http://a.test", False),
        ({"HTTP_PROXY": DEAD, "NO_PROXY": "a.test"}, "http://a.test", True),
    ],
)
def test_what_is_exempt_is_asked_directly(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], url: str, is_direct: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    def noting(how: str) -> httpx.MockTransport:
        return httpx.MockTransport(lambda _: asked.append(how) or httpx.Response(200))  # type: ignore[func-returns-value]

    with httpx.Client(transport=EnvironmentTransport(noting("directly"), lambda _: noting("through"))) as http:
        http.get(url)
    assert asked == ["directly" if is_direct else "through"]


@pytest.mark.parametrize("exempt", ["127.0.0.1", "fd00::/8,127.0.0.0/8", "*"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://[::1", DEAD])
def test_a_service_that_is_exempt_needs_no_proxy_that_works(
    service: ThreadService, monkeypatch: pytest.MonkeyPatch, proxy: str, exempt: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", exempt)
    with Client(service.url, retry_for=0) as client:
        client.runs()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://[::1", "http://[::1"),
        ("http://host:port", "http://host:port"),
        ("http://", "http://"),
        ("socks4://host:1080", "socks4://host:1080"),
        ("ftp://name:secret@host", "host"),
        ("http://name:secret/more@host", "host"),
        ("http://name:secret://@host", "host"),
        ("name:secret?@host:port", "host:port"),
    ],
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "http_proxy"])
def test_a_proxy_that_cannot_be_one_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSetting) as caught:
        Client("http://service.test")
    assert str(caught.value).startswith(f"the proxy {shown!r} of {variable} cannot be used: ")
    assert "secret" not in str(caught.value)


def test_a_socks_proxy_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    with pytest.raises(InvalidSetting, match="of ALL_PROXY cannot be used without the package socksio: pip install"):
        Client("http://service.test")


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://name:secret@127.0.0.1:1")
    with Client("http://service.test", retry_for=0) as client, pytest.raises(ServiceUnreachable) as caught:
        client.runs()
    assert "http://service.test did not answer: the proxy '127.0.0.1:1' of HTTP_PROXY: " in str(caught.value)
    assert "refused" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_proxy_that_refuses_is_named(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(status: str) -> Callable[[Peer], None]:
        def script(peer: Peer) -> None:
            peer.head()
            peer.answer("no", status, Connection="close")

        return script

    url = serve(refuses("407 Proxy Authentication Required"), refuses("403 Forbidden")).url
    monkeypatch.setenv("ALL_PROXY", url)
    with Client("http://service.test", retry_for=0) as client:
        with pytest.raises(UnexpectedResponse, match=f"answered 407 through the proxy '{url}' of ALL_PROXY: 'no'"):
            client.runs()
    with Client("https://service.test", retry_for=0) as client:
        with pytest.raises(ServiceUnreachable, match=f"the proxy '{url}' of ALL_PROXY: 403 Forbidden"):
            client.runs()


@pytest.mark.parametrize(
    ("environment", "code", "line"),
    [
        ({"ALL_PROXY": "http://[::1"}, 2, "freestep: the proxy 'http://[::1' of ALL_PROXY cannot be used: "),
        ({"HTTP_PROXY": DEAD}, 3, f"the proxy '{DEAD}' of HTTP_PROXY: "),
    ],
)
def test_the_command_names_the_variable(environment: dict[str, str], code: int, line: str) -> None:
    done = forked.freestep("runs", "list", "--url", "http://service.test", **environment)
    assert done.returncode == code
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_tensors_go_through_a_proxy(service: ThreadService, monkeypatch: pytest.MonkeyPatch) -> None:
    name, count = f"proxied-{uuid.uuid4().hex[:8]}", 1_000_000
    spec = {
        "optimizer": {"algorithm": "sgd", "lr": 1.0},
        "aggregation": {"policy": "async"},
        "parameters": [{"name": "w", "shape": [count]}],
    }
    weights = torch.arange(count, dtype=torch.float32)
    with Cutter(service.url, []) as cutter:
        # A server understands the targets that a proxy is sent.
        monkeypatch.setenv("HTTP_PROXY", cutter.url)
        with Client("http://service.test", retry_for=0) as client:
            run = client.run(name)
            run.create(spec)
            run.initialize({"w": weights})
            gradient, y = Flat(run.manifest), Flat(run.manifest)
            gradient.vector.fill_(1.0)
            with run.lease() as lease:
                receipt, _ = run.exchange(gradient, lease.claim(0), y)
            assert receipt.decision == "applied"
            assert torch.equal(y.vector, weights - 1)
            assert torch.equal(run.pull("y")[0]["w"], weights - 1)
            run.delete()
