"""The keys that an issuer publishes: they change under way; who publishes anything else is an issuer that is away."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from access.asking import ACCOUNT, asked, names
from freestep import Client
from freestep_service.access import issuer_keys
from harness import ThreadService
from issuers import CONFIGURATION, KEYS, Issuer, key_pair, public_jwk
from meanwhile import at_once, wait_until
from plain_calls import Api, slug
from raw_pushes import begun


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}


@contextmanager
def event_stream(service: ThreadService, token: str, path: str) -> Iterator[Iterator[str]]:
    """The lines of a run's events, as they come."""
    with httpx.stream("GET", service.url + path, headers=bearing(token), timeout=60) as answer:
        assert answer.status_code == 200
        yield answer.iter_lines()


def test_keys_change_under_way(own: Issuer, start_service: Callable[..., ThreadService], unhurried: None) -> None:
    service = start_service(**own.settings())
    old, new = own.token(), own.token(key_pair("RSA", 1), kid="two")
    assert asked(service, old).status_code == 200
    assert names(asked(service, new), "no key that the token could be signed with")
    own.publish(one=key_pair("RSA"), two=key_pair("RSA", 1))
    assert [asked(service, each).status_code for each in (new, old)] == [200, 200]
    # What a withdrawn key has signed is good no more, though it was verified.
    own.publish(two=key_pair("RSA", 1))
    assert names(asked(service, own.token(kid="three")), "no key")
    assert asked(service, new).status_code == 200
    assert names(asked(service, old), "no key that the token could be signed with")


def test_what_is_under_way_ends_with_a_key_that_is_withdrawn(
    own: Issuer, start_service: Callable[..., ThreadService], unhurried: None
) -> None:
    own.publish(one=key_pair("RSA"), two=key_pair("RSA", 1))
    service = start_service(**own.settings({"claim": "sub", "matches": "*", "scope": "admin"}))
    old, new = own.token(), own.token(key_pair("RSA", 1), kid="two")
    wish = b'{"name": "left behind", "scope": "read"}'
    with ExitStack() as stack:
        api = Api(service.url)
        stack.callback(api.http.close)
        api.create()
        read = [stack.enter_context(event_stream(service, token, api.path("/events"))) for token in (old, new)]
        sends = [
            stack.enter_context(begun(service.url, "POST", "/v1/tokens", len(wish), bearing(token)))
            for token in (old, new)
        ]
        for each in read:
            next(each)
        # What says nothing of a key is no other key.
        own.documents[KEYS] = {"keys": [public_jwk(key_pair("RSA", 1), kid="two", x5t="thumbprint")]}
        assert names(asked(service, own.token(kid="three")), "no key")
        assert [status for status, _ in (send(wish) for send in sends)] == [401, 201]
        api.lease("somebody")
        assert "somebody" not in "".join(read[0])
        assert any("somebody" in text for text in read[1])


def test_keys_are_read_anew_after_some_time(
    own: Issuer, start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_keys, "_PAUSE_S", 0.0)
    monkeypatch.setattr(issuer_keys, "_REFRESH_S", 0.02)
    service = start_service(**own.settings())
    token = own.token()
    assert asked(service, token).status_code == 200
    own.publish(two=key_pair("RSA", 1))
    wait_until(lambda: asked(service, token).status_code == 401)


def test_known_keys_go_on_while_the_issuer_is_away(
    start_service: Callable[..., ThreadService], unhurried: None, caplog: pytest.LogCaptureFixture
) -> None:
    own = Issuer()
    service = start_service(**own.settings())
    seen, unseen = own.token(), own.token(sub="another")
    assert asked(service, seen).status_code == 200
    own.close()
    for _ in range(2):
        answer = asked(service, own.token(kid="two"))
        assert (answer.status_code, slug(answer)) == (503, "issuer-unavailable")
        assert answer.headers["Retry-After"] == "5"
    assert [asked(service, each).status_code for each in (seen, unseen)] == [200, 200]
    assert asked(service, own.token(kid="two"), "/readyz").status_code == 200
    assert names(asked(service, own.token(iss="https://other.test")), "of another issuer")
    assert sum("keys that are known go on" in record.getMessage() for record in caplog.records) == 1


def test_a_service_starts_without_its_issuer_and_a_worker_waits_for_it(
    own: Issuer, start_service: Callable[..., ThreadService], unhurried: None
) -> None:
    keys = own.documents.pop(KEYS)
    service = start_service(**own.settings())
    assert slug(asked(service, own.token())) == "issuer-unavailable"
    own.documents[KEYS] = keys
    with Client(service.url, token=own.token(), retry_for=60) as client:
        assert client.runs() == []


def test_tokens_with_invented_keys_do_not_flood_the_issuer(
    own: Issuer, start_service: Callable[..., ThreadService]
) -> None:
    service = start_service(**own.settings())
    assert asked(service, own.token()).status_code == 200
    before = len(own.asked)
    with httpx.Client(base_url=service.url) as http:

        def flood(number: int) -> list[int]:
            tokens = [own.token(kid=f"invented-{number}-{each}") for each in range(40)]
            return [http.get("/v1/runs", headers={"Authorization": f"Bearer {token}"}).status_code for token in tokens]

        answers = at_once(*(lambda number=number: flood(number) for number in range(8)))  # type: ignore[misc]
    assert {status for each in answers for status in each} <= {401, 503}
    assert len(own.asked) == before
    assert asked(service, own.token(sub="fresh")).status_code == 200


@pytest.mark.parametrize(
    ("path", "document"),
    [
        (CONFIGURATION, 404), (CONFIGURATION, {"issuer": "https://other.test", "jwks_uri": "https://other.test/keys"}),
        (CONFIGURATION, {"jwks_uri": "SELF/keys"}), (CONFIGURATION, {"issuer": "SELF"}),
        (CONFIGURATION, {"issuer": "SELF", "jwks_uri": "http://keys.test/"}),
        (CONFIGURATION, {"issuer": "SELF", "jwks_uri": 7}),
        (CONFIGURATION, []), (CONFIGURATION, b"no JSON"), (KEYS, 500), (KEYS, 302), (KEYS, {"keys": 7}), (KEYS, {}),
        (KEYS, b"[" * 100_000), (KEYS, b" " * (1 << 20) + b'{"keys": []}'), (KEYS, b"\xff"),
    ],
    ids=lambda each: str(each)[:40],
)  # fmt: skip
def test_an_issuer_that_publishes_something_else_is_away(
    own: Issuer,
    start_service: Callable[..., ThreadService],
    caplog: pytest.LogCaptureFixture,
    path: str,
    document: Any,
) -> None:
    own.documents[path] = (
        json.loads(json.dumps(document).replace("SELF", own.url)) if isinstance(document, dict) else document
    )
    service = start_service(**own.settings())
    answer = asked(service, own.token())
    assert (answer.status_code, slug(answer)) == (503, "issuer-unavailable")
    # What exactly is the service's user's to know.
    assert answer.json()["detail"] == "The issuer of the token does not answer"
    assert "the issuer's keys that are known go on" in caplog.text


def test_the_api_server_of_kubernetes_is_an_issuer(start_service: Callable[..., ThreadService], tmp_path: Path) -> None:
    """Its keys are read at a URL of its own, over TLS with a CA of its own, with the pod's own token."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("the-pods-own\n")
    with closing(Issuer(context)) as server, closing(Issuer()) as other:
        kubernetes = {"oidc_ca_certs": tmp_path / "ca.crt", "oidc_token_file": tmp_path / "token"}
        rule = {"claim": "sub", "matches": "system:serviceaccount:train:*", "scope": "push"}
        token = server.token(sub=ACCOUNT)
        service = start_service(tmp_path / "discovered", **server.settings(rule, **kubernetes))
        assert asked(service, token).status_code == 200
        issuer = "https://kubernetes.default.svc"
        named = server.settings(rule, **{**kubernetes, "oidc_issuer": issuer, "oidc_jwks_url": server.url + KEYS})
        service = start_service(tmp_path / "named", **named)
        assert asked(service, server.token(sub=ACCOUNT, iss=issuer)).status_code == 200
        assert {credentials for _, credentials in server.asked} == {"Bearer the-pods-own"}
        # To nobody else goes the pod's token.
        server.documents[CONFIGURATION]["jwks_uri"] = other.url + KEYS
        service = start_service(tmp_path / "elsewhere", **server.settings(rule, **kubernetes))
        assert asked(service, token).status_code == 200
        assert {credentials for _, credentials in other.asked} == {None}


@pytest.mark.parametrize("text", ["pod hunter2", "pod\nhunter2", "", None])
def test_neither_the_log_nor_a_refusal_shows_how_keys_are_read(
    own: Issuer,
    start_service: Callable[..., ThreadService],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
    url = f"{own.url.replace('://', '://user:hunter2@')}/none?secret=hunter2"
    for number, more in enumerate([{"oidc_token_file": file}, {}]):
        service = start_service(tmp_path / str(number), **own.settings(oidc_jwks_url=url, **more))
        answer = asked(service, own.token())
        assert slug(answer) == "issuer-unavailable"
        assert "hunter2" not in answer.text + caplog.text and str(file) not in answer.text
    assert "it was answered with 404" in caplog.text
