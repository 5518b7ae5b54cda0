"""Certificates of clients: what they let in to, at the process that sees them and at others."""

from __future__ import annotations

import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from http.client import RemoteDisconnected
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from certificates import AUTHORITY, calls, issued, showing
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.coordination.secret import SECRET_KEY
from freestep_service.domain.tokens import Token
from freestep_service.settings import CannotStart, Settings
from freestep_service.tls import uvicorn_options
from harness import AUTHORIZED, ThreadService
from meanwhile import at_once
from plain_calls import BODY, TENSORS, ShardedApi, slug
from raw_pushes import begun

# What a certificate allows


def test_a_certificate_allows_what_its_scope_does(certified: ThreadService, tmp_path: Path) -> None:
    api = calls(certified, issued(tmp_path), "mine-scope")
    with closing(api.http):
        api.create()
        assert api.push(api.lease("fleet-1-a"), 0).json()["step"] == 1
        for answer in (api.http.delete(api.path()), api.http.get("/v1/tokens"), api.http.get("/v1/runs/yours")):
            assert (answer.status_code, slug(answer)) == (403, "forbidden")
        # The name in a pattern is no pattern, nor another certificate's.
        for worker in ("fleet-2-a", "worker", "fleet-1"):
            refused = api.http.post(api.path("/leases"), json={"worker": worker})
            assert slug(refused) == "forbidden"
            assert "fleet-1-*" in refused.json()["detail"]


@pytest.mark.parametrize("name", ["*", "fleet-[1]", "?", "{name}", "Größe 7"])
def test_a_name_is_no_pattern(certified: ThreadService, tmp_path: Path, name: str) -> None:
    made = AUTHORITY.issue_cert("odd.test", common_name=name)
    made.private_key_and_cert_chain_pem.write_to_path(tmp_path / "odd.pem")
    api = calls(certified, tmp_path / "odd.pem", f"mine-{hashlib.md5(name.encode()).hexdigest()}")
    with closing(api.http):
        api.create()
        api.lease(f"{name}-1")
        assert slug(api.http.post(api.path("/leases"), json={"worker": "fleet-1-1"})) == "forbidden"


def test_a_certificate_without_a_common_name_has_another(certified: ThreadService, tmp_path: Path) -> None:
    AUTHORITY.issue_cert("site-a.test").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    api = calls(certified, tmp_path / "cert.pem", "mine-unnamed")
    with closing(api.http):
        api.create()
        api.lease("site-a.test-1")


def test_a_token_counts_before_the_certificate(certified: ThreadService, tmp_path: Path) -> None:
    with closing(calls(certified, issued(tmp_path), "mine-both").http) as http:
        assert http.get("/v1/tokens", headers=AUTHORIZED).status_code == 200
        reader = http.post("/v1/tokens", json={"name": "n", "scope": "read"}, headers=AUTHORIZED).json()["token"]
        for token, slugs in ((reader, "forbidden"), ("wrong", "unauthenticated")):
            headers = {"Authorization": f"Bearer {token}"}
            assert slug(http.put("/v1/runs/mine-both", json={}, headers=headers)) == slugs


def test_who_shows_none_needs_a_token(certified: ThreadService) -> None:
    with closing(calls(certified, None, "mine-none").http) as http:
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        answer = http.get("/v1/runs")
        assert (answer.status_code, slug(answer)) == (401, "unauthenticated")
        assert http.get("/v1/runs", headers=AUTHORIZED).status_code == 200


def test_a_certificate_is_none_where_nobody_asks_for_it(
    tls_service: ThreadService, certified: ThreadService, tmp_path: Path
) -> None:
    with closing(calls(tls_service, issued(tmp_path), "mine-unasked").http) as http:
        assert slug(http.get("/v1/runs")) == "unauthenticated"


def test_the_audit_log_names_the_certificate(
    start_service: Callable[..., ThreadService], client_ca: dict[str, Path], tmp_path: Path
) -> None:
    service = start_service(**client_ca)
    for _ in range(2):
        # Its next certificate has the same name.
        with closing(calls(service, issued(tmp_path), "x").http) as http:
            assert http.delete("/v1/runs/x").status_code == 403
    service.stop()
    noted = [json.loads(line)["who"] for line in (service.settings.data_dir / "audit.jsonl").read_text().splitlines()]
    assert len(noted) == 2 and len(set(noted)) == 1
    assert noted[0].startswith("certificate fleet-1 ")


def test_a_connection_whose_certificate_expires_while_a_body_comes_ends(
    start_service: Callable[..., ThreadService],
    client_ca: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for later requests, so that a client shows the certificate that it has by then."""
    service, file = start_service(**client_ca), issued(tmp_path)
    api = calls(service, file, "late")
    with closing(api.http):
        assert api.http.put(api.path(), json=api.spec()).status_code == 201
        headers = {"Content-Type": MEDIA_TYPE}
        trusted = showing(service, file)
        with begun(api.url, "PUT", api.path("/parameters"), len(BODY), headers, trusted) as send:
            with monkeypatch.context() as later:
                later.setattr(service.app.state.context.tokens, "_clock", lambda: time.time() + 10**11)
                with pytest.raises((RemoteDisconnected, ConnectionError, ssl.SSLEOFError)):
                    send(BODY)
        assert not api.status()["initialized"]


# Between processes


@pytest.mark.parametrize("at", [0, 1])
def test_other_processes_are_told_whose_request_they_get(
    certified_nodes: list[ThreadService], tmp_path: Path, at: int
) -> None:
    api = calls(certified_nodes[at], issued(tmp_path), f"relayed-{at}", ShardedApi)
    with closing(api.http):
        api.create(shards=2)
        assert {shard["url"] for shard in api.shards} == {node.url for node in certified_nodes}
        lease = api.lease()
        assert api.push(lease, 0).json()["step"] == 1
        assert api.pull("y")[0].keys() == TENSORS.keys()
        # All parts through this one, of which one is at the other.
        url, bodies = certified_nodes[at].url, api.bodies(TENSORS)
        pushed = at_once(
            *(lambda shard=shard: api.push_part(shard, lease, 1, "key", bodies[shard], url) for shard in range(2))
        )
        assert [answer.json()["step"] for answer in pushed] == [2, 2]
        state = api.http.get(api.path("/state"))
        headers = {"Content-Type": state.headers["Content-Type"]}
        put = api.http.put(api.path("/state?replace=true"), content=state.content, headers=headers)
        assert put.status_code == 200, put.text
        assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code in (204, 410)
        assert api.http.post(api.path("/checkpoints")).is_success
        assert api.http.delete(api.path()).status_code == 204


def test_a_run_of_one_shard_elsewhere_is_reached_too(certified_nodes: list[ThreadService], tmp_path: Path) -> None:
    for number in range(2):
        api = calls(certified_nodes[0], issued(tmp_path), f"single-{number}")
        with closing(api.http):
            api.create()
            owner = api.http.get(api.path("/topology")).json()["shards"][0]["url"]
            other = next(node for node in certified_nodes if node.url != owner)
            there = calls(other, issued(tmp_path), api.run)
            with closing(there.http):
                lease = there.lease()
                assert there.push(lease, 0).json()["step"] == 1
                assert there.http.delete(there.path(f"/leases/{lease['lease']}")).status_code == 204


def test_only_processes_say_whose_request_it_is(certified_nodes: list[ThreadService], tmp_path: Path) -> None:
    with certified_nodes[0].redis() as redis:
        secret = str(redis.get(SECRET_KEY)).encode()
    token, path = Token("certificate x", "admin", "0" * 64, 0).to_json(), "/v1/tokens"
    good, over = f"{int(time.time()) + 60} {token}", f"{int(time.time()) - 1} {token}"

    def signed(*parts: str, key: bytes = secret) -> str:
        return hmac.new(key, " ".join(parts).encode(), hashlib.sha256).hexdigest()

    def asked(line: str | None, signature: str | None, method: str = "GET", target: str = path) -> int:
        lines = {"Freestep-Caller": line, "Freestep-Relayed": signature}
        headers = {name: value for name, value in lines.items() if value is not None}
        return http.request(method, target, headers=headers).status_code

    with closing(calls(certified_nodes[0], None, "x").http) as http:
        assert asked(good, signed("GET", path, good)) == 200
        for line, signature in (
            (good, None),
            (good, "1"),
            (good, signed("GET", path)),
            (good, signed("GET", path, over)),
            (good, signed("GET", "/v1/runs", good)),
            (good, signed("POST", path, good)),
            (good, signed("GET", path, good, key=b"another")),
            (over, signed("GET", path, over)),
            (None, signed("GET", path)),
            (None, signed("GET", path, good)),
        ):
            assert asked(line, signature) == 401, (line, signature)
        # An ended token of the header's lets nobody in either.
        ended = f"{int(time.time()) + 60} {Token('certificate x', 'admin', '0' * 64, 0, expires_at=1).to_json()}"
        with pytest.raises(httpx.RemoteProtocolError):
            asked(ended, signed("GET", path, ended))


def test_what_a_client_says_of_itself_is_not_passed_on(certified_nodes: list[ThreadService], tmp_path: Path) -> None:
    """A reader's token does not become an admin's at the process behind."""
    admin = calls(certified_nodes[0], issued(tmp_path), "claims", ShardedApi)
    with closing(admin.http):
        admin.create(shards=2)
        reader = admin.http.post("/v1/tokens", json={"name": "n", "scope": "read"}).json()["token"]
        line = f"{int(time.time()) + 60} {Token('certificate x', 'admin', '0' * 64, 0).to_json()}"
        with closing(calls(certified_nodes[0], None, admin.run, ShardedApi).http) as http:
            headers = {"Authorization": f"Bearer {reader}", "Freestep-Caller": line}
            assert http.get(admin.path("/parameters"), headers=headers).status_code == 200
            for node in certified_nodes:
                away = f"{node.url}{admin.path('/gradients')}?shard=0&of=2"
                assert slug(http.post(away, headers=headers)) == "forbidden"


# Settings


def test_certificates_of_clients_need_tls(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="set ssl_certfile too"):
        Settings(ssl_client_ca=tmp_path / "ca.pem")


@pytest.mark.parametrize("name", ["none.pem", "empty.pem"])
def test_a_ca_that_cannot_be_read_is_told(tls: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.pem").touch()
    with pytest.raises(CannotStart, match=name):
        uvicorn_options(Settings(**tls, ssl_client_ca=tmp_path / name))
