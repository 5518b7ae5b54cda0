"""The proxies' configurations in front of a service: what passes through them is what was sent, when it was sent."""

from __future__ import annotations

import socket
import ssl
import uuid
from collections.abc import Iterator

import httpx
import pytest
import safetensors.torch
import torch

from deploy.conftest import Site
from freestep import Flat, LeaseExpired, NonFiniteGradient
from harness import AUTHORIZED
from meanwhile import DEADLINE_S, wait_until
from plain_calls import Api, slug
from raw_pushes import answered, head_of_a_push, is_pending

NUMEL = 10 * 1024 * 1024
"""40 MiB as fp32: more than twice what all sockets and proxies on the way hold in memory."""
BODY = safetensors.torch.save({"w": torch.ones(NUMEL)})
SPEC = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": "w", "shape": [NUMEL]}],
    "durability": "none",
}


@pytest.fixture
def large(site: Site) -> Iterator[Api]:
    """A run of one large tensor, 0 everywhere."""
    api = site.api()
    assert api.http.put(api.path(), json=SPEC).status_code == 201
    assert api.initialize({"w": torch.zeros(NUMEL)}).status_code == 201
    yield api
    api.http.delete(api.path())
    api.http.close()


def dialled(site: Site, source: str = "127.0.0.1", *, buffer: int | None = None) -> ssl.SSLSocket:
    """A connection of the test's own to the proxy, from an address of this machine."""
    plain = socket.socket()
    plain.settimeout(DEADLINE_S)
    if buffer:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    plain.bind((source, 0))
    plain.connect(("127.0.0.1", site.front.port))
    return site.trusted.wrap_socket(plain, server_hostname="localhost")


def is_at_rest(site: Site) -> bool:
    """Whether the service answers no request."""
    return not site.service._server.server_state.tasks


def test_a_push_reaches_the_service_before_it_has_been_sent(site: Site, large: Api) -> None:
    lease = large.lease()
    head = head_of_a_push(large.path("/gradients"), {**large.headers(lease, 0, "half"), "Host": "localhost"}, len(BODY))
    with dialled(site) as connection:
        connection.sendall(head + BODY[: 1024 * 1024])
        wait_until(lambda: is_pending(site.service, large, "half"))
        assert site.front.temporary_files() == []
        connection.sendall(BODY[1024 * 1024 :])
        assert b'"applied"' in answered(connection)
    y, step = large.pull("y")
    assert step == 1
    assert bool((y["w"] == -1).all())
    assert site.front.temporary_files() == []


def test_a_pull_is_not_taken_from_the_service_before_it_is_read(
    site: Site, large: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader stands still for longer than the service bears: a proxy that holds it all would go on sending."""
    monkeypatch.setattr(site.service.app.state.context.relay, "stall_s", 0.5)
    with dialled(site, buffer=64 * 1024) as connection:
        lines = [f"GET {large.path('/parameters')}?point=y HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in AUTHORIZED.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        wait_until(lambda: is_at_rest(site))
        assert site.front.temporary_files() == []
        received = 0
        try:
            while part := connection.recv(1 << 20):
                received += len(part)
        except (ssl.SSLError, ConnectionError):
            pass
        assert 0 < received < len(BODY) // 2


def test_a_client_trains_through_it(site: Site) -> None:
    with site.client(retry_for=0) as client:
        run = client.run(f"run-{uuid.uuid4().hex[:8]}")
        run.create(SPEC)
        run.initialize({"w": torch.zeros(NUMEL)})
        gradient, y = Flat(run.manifest), Flat(run.manifest)
        gradient.vector.fill_(1)
        with run.lease() as lease:
            for step in range(3):
                receipt, pulled = run.exchange(gradient, lease.claim(step), y)
                assert (receipt.step, pulled.step) == (step + 1, step + 1)
                assert bool((y.vector == -(step + 1)).all())
        assert run.pull("x", dtype="BF16")[1] == 3
        run.delete()
    assert site.front.temporary_files() == []


def test_a_refusal_reaches_who_is_still_sending(site: Site) -> None:
    with site.client(retry_for=0) as client:
        run = client.run(f"run-{uuid.uuid4().hex[:8]}")
        run.create(SPEC)
        run.initialize({"w": torch.zeros(NUMEL)})
        gradient = Flat(run.manifest)
        over = run.lease("me")
        with run.lease("me") as lease:
            for _ in range(3):
                # Refused by its head, and by its body.
                with pytest.raises(LeaseExpired):
                    run.push(gradient, over.claim(0))
                gradient.vector.fill_(torch.inf)
                with pytest.raises(NonFiniteGradient):
                    run.push(gradient, lease.claim(0))
                gradient.vector.fill_(1)
            assert run.push(gradient, lease.claim(0)).step == 1
        run.delete()


def test_a_wait_goes_through_and_ends_with_its_client(site: Site) -> None:
    api = site.api()
    api.create()
    path = api.path("/parameters?point=y&min_step=1")
    assert api.http.get(path, headers={"Prefer": "wait=0.2"}).status_code == 504
    with dialled(site) as connection:
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Prefer: wait=600"]
        lines += [f"{name}: {value}" for name, value in AUTHORIZED.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        wait_until(lambda: not is_at_rest(site))
    wait_until(lambda: is_at_rest(site))
    api.http.delete(api.path())
    api.http.close()


def test_connections_to_the_service_are_used_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    places, taken = site.service.places, list[str]()
    take = places.take
    with httpx.Client(base_url=site.url, verify=site.trusted, headers=AUTHORIZED) as http:
        http.get("/v1/runs")
        monkeypatch.setattr(places, "take", lambda host: taken.append(host) or take(host))  # type: ignore[func-returns-value]
        for _ in range(20):
            assert http.get("/v1/runs").status_code == 200
    # nginx's processes have connections of their own.
    assert len(taken) <= 1


def test_the_service_knows_the_client(site: Site) -> None:
    """Its address, whatever it says of itself."""
    claims = {"X-Forwarded-For": "192.0.2.1", "X-Real-IP": "192.0.2.1", "Forwarded": "for=192.0.2.1"}
    noted = len(site.refused())
    transport = httpx.HTTPTransport(local_address="127.0.0.2", verify=site.trusted)
    with httpx.Client(base_url=f"https://localhost:{site.front.port}", transport=transport, headers=claims) as http:
        assert slug(http.get("/v1/runs")) == "unauthenticated"
    wait_until(lambda: len(site.refused()) > noted)
    assert [line["peer"] for line in site.refused()[noted:]] == ["127.0.0.2"]


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:443"])
def test_a_foreign_name_is_refused(site: Site, host: str) -> None:
    with httpx.Client(base_url=site.url, verify=site.trusted, headers={**AUTHORIZED, "Host": host}) as http:
        answer = http.get("/v1/runs")
        assert answer.status_code in (403, 421)
        assert "runs" not in answer.text


def test_a_page_of_another_site_is_refused(site: Site) -> None:
    with httpx.Client(base_url=site.url, verify=site.trusted, headers=AUTHORIZED) as http:
        assert http.get("/v1/runs", headers={"Origin": site.url}).status_code == 200
        assert http.get("/v1/runs", headers={"Origin": "https://attacker.example"}).status_code == 403
        assert http.get("/v1/runs", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
