"""Tokens of an OpenID Connect issuer: what lets in, and what does not."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from access.asking import ACCOUNT, asked, names
from freestep import Client
from freestep.api.token_form import make_token
from harness import ThreadService
from issuers import KEYS, Issuer, encoded, key_pair, public_jwk
from plain_calls import Api, ShardedApi, slug

RULES = [
    {"claim": ["kubernetes.io", "namespace"], "matches": "train", "scope": "push", "runs": "k8s-*", "workers": "pod-*"},
    {"claim": "groups", "matches": "operators", "scope": "admin"},
    {"claim": "email_verified", "matches": "true", "scope": "read"},
    {"claim": "sub", "matches": "worker-*", "scope": "push", "runs": "mine-*"},
    {"claim": "sub", "matches": "worker-1", "scope": "admin"},
]
RUNS, METHODS = ("mine-1", "yours", "k8s-1"), ("GET", "PUT", "DELETE")
EVERYTHING = {f"{method} {run}" for method in METHODS for run in RUNS}


@pytest.fixture(scope="module")
def service(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadService]:
    running = ThreadService(tmp_path_factory.mktemp("data"), **issuer.settings(*RULES))
    yield running
    running.stop()


# What lets in


@pytest.mark.parametrize(
    ("claims", "allowed"),
    [
        ({"sub": "worker-7"}, {"GET mine-1", "PUT mine-1"}),
        # The first rule that fits counts.
        ({"sub": "worker-1"}, {"GET mine-1", "PUT mine-1"}),
        ({"email_verified": True}, {"GET mine-1", "GET yours", "GET k8s-1"}),
        ({"groups": ["staff", "operators"]}, EVERYTHING),
        ({"sub": ACCOUNT, "kubernetes.io": {"namespace": "train"}}, {"GET k8s-1", "PUT k8s-1"}),
        ({"sub": "worker-8", "kubernetes.io": "train"}, {"GET mine-1", "PUT mine-1"}),
    ],
)  # fmt: skip
def test_the_first_rule_that_fits_says_what_a_token_allows(
    issuer: Issuer, service: ThreadService, claims: dict[str, Any], allowed: set[str]
) -> None:
    token = issuer.token(**claims)
    for run in RUNS:
        for method in METHODS:
            answer = asked(service, token, f"/v1/runs/{run}", method)
            assert (answer.status_code not in (401, 403)) == (f"{method} {run}" in allowed), answer.text


def test_workers_are_bound_to_names(issuer: Issuer, service: ThreadService) -> None:
    api = Api(service.url, "k8s-bound")
    token = issuer.token(sub=ACCOUNT, **{"kubernetes.io": {"namespace": "train"}})
    with closing(api.http):
        api.http.headers["Authorization"] = f"Bearer {token}"
        api.create()
        assert api.push(api.lease("pod-1"), 0).json()["step"] == 1
        refused = api.http.post(api.path("/leases"), json={"worker": "other"})
        assert (refused.status_code, slug(refused)) == (403, "forbidden")


@pytest.mark.parametrize("more", [{}, {"groups": []}, {"groups": {}}, {"email_verified": False}], ids=str)
def test_a_token_that_no_rule_is_for_is_forbidden(issuer: Issuer, service: ThreadService, more: dict[str, Any]) -> None:
    claims = {"sub": "stranger", **more}
    answer = asked(service, issuer.token(**claims), "/v1/runs/mine-1")
    assert (answer.status_code, slug(answer)) == (403, "forbidden")
    detail = (
        f"no rule of this service is for 'oidc {claims['sub']}': a token of scope read for the run 'mine-1' is needed"
    )
    assert answer.json()["detail"] == detail
    # What is open to all is open to it.
    assert asked(service, issuer.token(**claims), "/readyz").status_code == 200


def test_the_services_own_tokens_count_beside(issuer: Issuer, service: ThreadService) -> None:
    with Api(service.url).http as http:
        assert http.get("/v1/tokens").status_code == 200
        made = http.post("/v1/tokens", json={"name": "n", "scope": "read"}).json()["token"]
    assert asked(service, made).status_code == 200
    assert names(asked(service, make_token("read")), "unknown, or was revoked")


def test_the_audit_log_names_the_subject(own: Issuer, start_service: Callable[..., ThreadService]) -> None:
    service = start_service(**own.settings(*RULES))
    for changes in (
        {"sub": "root", "groups": ["operators"]},
        {"sub": "worker-7"},
        {"sub": "stranger"},
        {"aud": "other"},
    ):
        for _ in range(2):
            asked(service, own.token(**changes), "/v1/runs/none", "DELETE")
    service.stop()
    files = [service.settings.data_dir / name for name in ("audit.jsonl", "refusals.jsonl")]
    noted, strangers = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(noted) == len(strangers) == 4
    noted += strangers
    assert [each["result"] for each in noted[::2]] == ["run-not-found", "forbidden", "forbidden", "unauthenticated"]
    whom = [str(each["who"]) for each in noted]
    assert [who.partition(" ")[0] for who in whom[::2]] == ["oidc", "oidc", "oidc", "None"]
    assert whom[0].startswith("oidc root ") and whom[2].startswith("oidc worker-7 ") and whom[4] == "oidc stranger"
    # The subject's next token is noted alike.
    assert whom[0] == whom[1]


def test_a_refused_sign_in_is_noted(own: Issuer, start_service: Callable[..., ThreadService]) -> None:
    service = start_service(**own.settings(*RULES))
    for changes, status in (({"sub": "stranger"}, 403), ({"aud": "other"}, 401)):
        answer = httpx.post(f"{service.url}/dashboard/session", json={"token": own.token(**changes)})
        assert answer.status_code == status
    service.stop()
    noted = [json.loads(line) for line in (service.settings.data_dir / "refusals.jsonl").read_text().splitlines()]
    found = [(each["what"], each["who"], each["result"]) for each in noted]
    assert found == [("sign_in", "oidc stranger", "forbidden"), ("sign_in", None, "unauthenticated")]


def test_a_worker_needs_its_file_only(
    issuer: Issuer, service: ThreadService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes projects it, and replaces it under way."""
    file = tmp_path / "token"
    file.write_text(issuer.token(sub="worker-7", exp=int(time.time()) - 3600))
    monkeypatch.delenv("FREESTEP_TOKEN")
    monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(file))
    with Client(service.url, retry_for=0) as client:
        file.with_name("new").write_text(issuer.token(sub="worker-7") + "\n")
        file.with_name("new").rename(file)
        assert client.runs() == []


# What does not


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iss": "https://elsewhere.test"}, "of another issuer"),
        ({"iss": None}, "of another issuer"),
        ({"iss": ["x"]}, "of another issuer"),
        ({"aud": "another"}, "for another audience"),
        ({"aud": ["another", "third"]}, "for another audience"),
        ({"aud": None}, "lacks the claim aud"),
        ({"sub": None}, "lacks the claim sub"),
        ({"sub": 7}, "cannot be verified"),
        ({"exp": None}, "lacks the claim exp"),
        ({"exp": "soon"}, "cannot be verified"),
        ({"exp": 0}, "has expired"),
        ({"private": "other"}, "not signed with the issuer's key"),
        ({"private": "EC", "algorithm": "ES256"}, "cannot be verified"),
        ({"kid": "strange"}, "no key that the token could be signed with"),
    ],
    ids=str,
)
def test_a_token_that_is_not_good_is_refused(
    issuer: Issuer, service: ThreadService, unhurried: None, changes: dict[str, Any], said: str
) -> None:
    others = {"other": key_pair("RSA", 1), "EC": key_pair("EC")}
    token = issuer.token(**{**changes, "private": others.get(changes.get("private", ""))})
    answer = asked(service, token)
    assert names(answer, said, "a token of scope read for all runs is needed")
    assert token not in answer.text


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "HS256", "HS384", "HS512", "RS1", ""])
def test_a_token_that_anybody_can_make_is_refused(issuer: Issuer, service: ThreadService, algorithm: str) -> None:
    assert names(asked(service, issuer.forged(algorithm)), "tokens have to be signed with one of RS256")


@pytest.mark.parametrize("text", [
    "x", "..", "a.b", "a.b.c.d.e", encoded(b"[]") * 2, f"{encoded(b'{}')}.{encoded(b'{}')}.",
    f"{encoded(b'[' * 20_000)}.{encoded(b'{}')}.x",
    f"{encoded(b'{')}.{encoded(b'[' * 20_000)}.x",
    f"{encoded(json.dumps({'alg': 'RS256', 'kid': 7}).encode())}.{encoded(b'{}')}.x",
    f"{encoded(json.dumps({'alg': 'RS256', 'kid': 'one', 'crit': ['x']}).encode())}.{encoded(b'{}')}.x",
    f"{encoded(json.dumps({'alg': ['RS256'], 'kid': 'one'}).encode())}.{encoded(b'{}')}.x", "é.é.é",
], ids=lambda text: text[:12])  # fmt: skip
def test_what_is_no_token_is_refused(service: ThreadService, text: str) -> None:
    answer = httpx.get(f"{service.url}/v1/runs", headers=[(b"Authorization", f"Bearer {text}".encode())])
    assert answer.status_code == 401, answer.text


def test_a_changed_token_is_refused(issuer: Issuer, service: ThreadService) -> None:
    head, payload, signature = issuer.token(sub="worker-7").split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    changed = encoded(json.dumps({**claims, "groups": ["operators"]}).encode())
    assert asked(service, f"{head}.{payload}.{signature}").status_code == 200
    assert names(asked(service, f"{head}.{changed}.{signature}"), "not signed with the issuer's key")
    assert names(asked(service, f"{head}.{payload}."), "not signed with the issuer's key")


@pytest.mark.parametrize(
    ("changes", "is_good"),
    [({"exp": -20}, True), ({"exp": -40}, False), ({"nbf": 20}, True), ({"nbf": 60}, False), ({"iat": 60}, False)],
    ids=str,
)
def test_clocks_may_differ_a_little(
    issuer: Issuer, service: ThreadService, changes: dict[str, int], is_good: bool
) -> None:
    now = int(time.time())
    answer = asked(service, issuer.token(sub="worker-7", **{name: now + value for name, value in changes.items()}))
    assert (answer.status_code == 200) == is_good or not names(
        answer, "expired" if "exp" in changes else "not good yet"
    )


@pytest.mark.parametrize(
    ("kind", "algorithm", "published"),
    [
        ("RSA", "RS512", {}), ("RSA", "PS256", {}), ("RSA", "RS256", {"alg": "RS256"}), ("EC", "ES256", {}),
        ("OKP", "EdDSA", {}), ("RSA", "PS256", {"alg": "RS256"}), ("EC", "ES256", {"use": "enc"}),
        ("OKP", "EdDSA", {"kid": None}),
    ],
)  # fmt: skip
def test_keys_are_of_all_kinds(
    own: Issuer,
    start_service: Callable[..., ThreadService],
    unhurried: None,
    kind: str,
    algorithm: str,
    published: dict[str, Any],
) -> None:
    private = key_pair(kind)
    strange = [
        {"kty": "new", "kid": "one"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "one"},
        {"kid": []},
        7,
        {"kty": "RSA", "n": 7},
    ]
    own.documents[KEYS] = {"keys": [*strange, public_jwk(private, **{"kid": "one", **published})]}
    service = start_service(**own.settings())
    # Without an ID it is the only key that there is.
    answer = asked(service, own.token(private, algorithm, None if "kid" in published else "one"))
    is_good = published.get("alg", algorithm) == algorithm and published.get("use", "sig") == "sig"
    assert answer.status_code == (200 if is_good else 401)


def test_the_algorithms_may_be_fewer(own: Issuer, start_service: Callable[..., ThreadService]) -> None:
    service = start_service(**own.settings(oidc_algorithms="ES256, PS256"))
    assert names(asked(service, own.token()), "one of ES256, PS256")
    assert asked(service, own.token(algorithm="PS256")).status_code == 200


@pytest.mark.parametrize("ends", [253_402_300_799, 253_402_300_800, 10**12, 10**30, 1e300])
def test_a_token_may_end_after_all_that_can_be_shown(issuer: Issuer, service: ThreadService, ends: float) -> None:
    token = issuer.token(groups=["operators"], exp=ends)
    assert asked(service, token).status_code == 200
    session = asked(service, token, "/dashboard/session")
    assert session.json()["expires_at"] == "9999-12-31T23:59:59+00:00"
    signed_in = httpx.post(f"{service.url}/dashboard/session", json={"token": token})
    assert signed_in.status_code == 201


def test_a_token_is_verified_once(own: Issuer, start_service: Callable[..., ThreadService]) -> None:
    service = start_service(**own.settings())
    token, context = own.token(exp=int(time.time()) + 3600), service.app.state.context
    credentials = f"Bearer {token}".encode()
    assert context.tokens.known(credentials) is None
    assert asked(service, token).status_code == 200
    found = context.tokens.known(credentials)
    assert found is not None and found is context.tokens.known(credentials)
    verifier = context.tokens._issuer
    verifier._clock = lambda: time.time() + 3625
    assert context.tokens.known(credentials) is found
    verifier._clock = lambda: time.time() + 3635
    assert context.tokens.known(credentials) is None


def test_every_process_verifies_the_token_of_a_relayed_request(
    issuer: Issuer, shared_nodes: Callable[..., list[ThreadService]]
) -> None:
    nodes = shared_nodes(2, **issuer.settings())
    api = ShardedApi(nodes[0].url)
    with closing(api.http):
        api.http.headers["Authorization"] = f"Bearer {issuer.token()}"
        api.create(shards=2)
        assert api.push(api.lease(), 0).json()["step"] == 1
        for node in nodes:
            assert httpx.get(node.url + api.path("/parameters"), headers=dict(api.http.headers)).status_code == 200
