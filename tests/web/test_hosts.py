"""Requests that web pages have made are refused: through host names that are not the service's, from other origins."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from asgi_calls import call, scope_of
from freestep_service.settings import Settings
from freestep_service.web.hosts import OwnHosts
from harness import AUTHORIZED, ThreadService
from plain_calls import Api, slug


def asked(service: ThreadService, headers: dict[str, str], path: str = "/v1/runs") -> httpx.Response:
    return httpx.get(f"{service.url}{path}", headers={**AUTHORIZED, **headers})


@pytest.mark.parametrize(
    "host",
    ["{netloc}", "localhost", "LOCALHOST:1234", "a.localhost", "127.0.0.1", "[::1]:8000", "192.0.2.7:8000", "{name}:1"],
)
def test_its_own_names_are_let_in(service: ThreadService, host: str) -> None:
    netloc = service.url.partition("://")[2]
    assert asked(service, {"Host": host.format(netloc=netloc, name=socket.gethostname())}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8000", "localhost.attacker.example", "127.0.0.1.attacker.example",
     "1.2.3.4.5", "xn--localhost", "[::1.]"],
)  # fmt: skip
def test_a_foreign_name_is_refused(service: ThreadService, api: Api, host: str) -> None:
    api.create()
    before = api.state(service)
    for method, path in (("GET", "/v1/runs"), ("GET", "/readyz"), ("GET", "/docs"), ("POST", api.path("/checkpoints"))):
        answer = httpx.request(method, f"{service.url}{path}", headers={**AUTHORIZED, "Host": host})
        assert (answer.status_code, slug(answer)) == (403, "forbidden")
        assert "allowed_hosts" in answer.json()["detail"]
        assert "WWW-Authenticate" not in answer.headers
    assert api.state(service) == before
    assert asked(service, {"Host": host}, "/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/v1/runs"])
@pytest.mark.parametrize(
    ("cookies", "kept"),
    [
        ("freestep-8000=abc_-1", "freestep-8000=abc_-1"),
        ("theirs=1; freestep-8000=abc;freestep-1=x\t; other", "freestep-8000=abc; freestep-1=x"),
        ("freestep-8000=old; freestep-8000=new", "freestep-8000=old; freestep-8000=new"),
        ("xfreestep-8000=a; freestep-=b; freestep-8000=c d; =freestep-8000=e", None),
        # Which Python's own parser would take seconds for.
        ('a="' + "\\" * 60_000 + '"', None),
        ('freestep-8000="' + "\\" * 60_000 + '"', None),
        ("", None),
    ],
    ids=range(7),
)
def test_cookies_of_others_are_taken_off(path: str, cookies: str, kept: str | None) -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append({name: value for name, value in scope["headers"]})

    guarded = OwnHosts(app, Settings(), lambda _: None)
    call(guarded, scope_of("GET", path, {"Cookie": cookies, "X-Other": "a"}))
    assert found[0].get(b"cookie") == (None if kept is None else kept.encode())
    assert (found[0][b"host"], found[0][b"x-other"]) == (b"127.0.0.1:8000", b"a")


def test_names_may_be_added(start_service: Callable[..., ThreadService]) -> None:
    service = start_service(
        allowed_hosts="Train.example.org, *.example.net", advertise_url="https://behind.example.com/freestep"
    )
    for host in (
        "train.example.org",
        "TRAIN.example.org:443",
        "a.example.net",
        "a.b.example.net",
        "behind.example.com",
    ):
        assert asked(service, {"Host": host}).status_code == 200
    for host in ("example.org", "example.net", "a.train.example.org", "example.net.attacker.example"):
        assert asked(service, {"Host": host}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://{netloc}"}, 200),
        ({"Origin": "https://{netloc}"}, 200),
        ({"Origin": "https://LOCALHOST", "Host": "localhost:80"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "other"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://{netloc}"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://attacker.example@{netloc}"}, 403),
    ],
)
def test_another_origin_is_refused(service: ThreadService, headers: dict[str, str], status: int) -> None:
    netloc = service.url.partition("://")[2]
    sent = {name: value.format(netloc=netloc) for name, value in headers.items()}
    answer = asked(service, sent)
    assert answer.status_code == status
    assert asked(service, sent, "/healthz").status_code == 200
    if status == 403:
        assert slug(answer) == "forbidden"
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_restores_nothing_even_where_there_are_no_tokens(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(insecure=True)
    api = connect(service.url)
    api.create()
    step = api.http.post(api.path("/checkpoints")).json()["step"]
    before = api.state(service)
    headers = {"Origin": "https://attacker.example", "Sec-Fetch-Site": "cross-site"}
    assert httpx.post(f"{service.url}{api.path(f'/checkpoints/{step}/restore')}", headers=headers).status_code == 403
    assert api.state(service) == before


def noted(service: ThreadService) -> list[dict[str, Any]]:
    service.stop()
    return [json.loads(line) for line in (service.settings.data_dir / "refusals.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("trusted", "peer"),
    [
        ("", "127.0.0.1"),
        ("192.0.2.1", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.7"),
        ("192.0.2.1, 127.0.0.0/8", "198.51.100.7"),
        # An address of the network.
        ("127.0.0.9/8", "198.51.100.7"),
    ],
)
def test_forwarded_addresses_are_believed_from_trusted_proxies_alone(
    start_service: Callable[..., ThreadService], trusted: str, peer: str
) -> None:
    service = start_service(trusted_proxies=trusted)
    forwarded = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Proto": "https"}
    assert asked(service, {**forwarded, "Authorization": "Bearer none"}).status_code == 401
    assert asked(service, {**forwarded, "Host": "attacker.example"}).status_code == 403
    refusals = noted(service)
    assert [each["peer"] for each in refusals] == [peer, peer]
    assert [each["what"] for each in refusals] == ["list_runs", "from another host or origin"]


def test_proxies_are_addresses() -> None:
    with pytest.raises(ValidationError, match="trusted_proxies"):
        Settings(trusted_proxies="proxy.example.org")
