"""`freestep doctor` and `freestep --version`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import forked
from freestep import CoordinatorUnavailable, Unauthenticated
from freestep.api.token_form import make_token
from freestep_service.state.shared_memory import IS_POSSIBLE
from harness import ThreadService, store
from scripted import Peer, Server

NOW = "Wed, 21 Oct 2015 07:28:00 GMT"


def doctor(url: str, *options: str, **environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and by check: ok or wrong, and the text."""
    done: CompletedProcess[str] = forked.freestep("doctor", "--url", url, *options, **environment)
    assert "Traceback" not in done.stderr
    found = {}
    for line in done.stdout.splitlines():
        verdict, check, text = line.split(maxsplit=2)
        assert verdict in ("ok", "wrong")
        found[check] = verdict, text
    assert done.returncode == (1 if "wrong" in [verdict for verdict, _ in found.values()] else 0)
    return done.returncode, found


def test_the_version_is_printed() -> None:
    done = forked.freestep("--version")
    assert (done.returncode, done.stdout) == (0, f"freestep {version('freestep')}\n")


def test_all_is_well(service: ThreadService) -> None:
    code, found = doctor(service.url)
    assert code == 0
    assert found == {
        "retries": ("ok", "workers repeat requests for 60 s (FREESTEP_RETRY_SECONDS)"),
        "url": ("ok", f"{service.url}, asked directly"),
        "trust": ("ok", "no certificates are needed for http"),
        "service": ("ok", "answers"),
        "version": ("ok", f"freestep {version('freestep')}, here and there"),
        "clock": ("ok", "within 10 s of the service's"),
        "token": ("ok", "accepted"),
        "redis": ("ok", "answers the service"),
        "device": ("ok", f"the service computes on {service.app.state.context.device}"),
        "memory": ("ok", "large bodies can go through memory that is shared"),
        "runs": ("ok", "no run has a problem"),
    }


def test_all_is_well_over_tls(tls_service: ThreadService, tls: dict[str, Path]) -> None:
    code, found = doctor(tls_service.url, FREESTEP_CA_CERTS=str(tls["ca_certs"]), FREESTEP_RETRY_SECONDS="7.5")
    assert code == 0
    assert found["retries"][1] == "workers repeat requests for 7.5 s (FREESTEP_RETRY_SECONDS)"
    assert found["trust"][1] == "1 CA certificates are trusted, those of FREESTEP_CA_CERTS"
    assert found["tls"][1].startswith("TLSv1.3, with a certificate that is trusted until ")


@pytest.mark.parametrize(
    ("url", "environment", "check", "said"),
    [
        ("localhost:8000", {}, "url", "perhaps http://localhost:8000 is meant"),
        ("local", {}, "url", "a client needs the URL of a service"),
        ("http://service.test", {"ALL_PROXY": "http://[::1"}, "url", "of ALL_PROXY cannot be used"),
        ("http://127.0.0.1:1", {"NO_PROXY": "*"}, "service", "see that `freestep serve` runs there"),
        ("http://service.test", {"HTTP_PROXY": "http://127.0.0.1:1"}, "service", "of HTTP_PROXY: "),
        ("http://a..b", {"NO_PROXY": "*"}, "service", "did not answer"),
        ("https://127.0.0.1:1", {"FREESTEP_CA_CERTS": "/none.pem"}, "trust", "/none.pem: the CA certificates cannot"),
        ("http://127.0.0.1:1", {"FREESTEP_RETRY_SECONDS": "soon"}, "retries", "FREESTEP_RETRY_SECONDS must be"),
        ("http://127.0.0.1:1", {"FREESTEP_TOKEN": "two words"}, "settings", "a token consists of visible ASCII"),
        ("http://127.0.0.1:1", {"FREESTEP_TOKEN": "schlüssel"}, "settings", "a token consists of visible ASCII"),
    ],
)
def test_what_is_wrong_here_is_said(url: str, environment: dict[str, str], check: str, said: str) -> None:
    code, found = doctor(url, **environment)
    assert code == 1
    assert found[check][0] == "wrong"
    assert said in found[check][1]


def test_certificates_that_are_not_trusted_are_said(tls_service: ThreadService, tls: dict[str, Path]) -> None:
    _, found = doctor(tls_service.url)
    assert found["service"][0] == "wrong"
    assert found["service"][1].endswith("let FREESTEP_CA_CERTS name the file of the CA that signed it")
    _, found = doctor(tls_service.url, SSL_CERT_FILE="", SSL_CERT_DIR="")
    assert found["trust"][1].endswith(" CA certificates are trusted, those of certifi")
    _, found = doctor(tls_service.url, SSL_CERT_FILE=str(tls["ca_certs"]))
    assert found["trust"][1] == "1 CA certificates are trusted, those of SSL_CERT_FILE"
    other = tls_service.url.replace("127.0.0.1", "localhost")
    _, found = doctor(other, FREESTEP_CA_CERTS=str(tls["ca_certs"]))
    assert found["service"][1].endswith("use a host that the certificate names")


def test_the_other_scheme_is_said(service: ThreadService, tls_service: ThreadService) -> None:
    for url, other in ((service.url, "https"), (tls_service.url, "http")):
        wrong = f"{other}://{url.partition('://')[2]}"
        assert doctor(wrong)[1]["service"] == (
            "wrong", f"the server at {wrong} speaks {url.partition(':')[0]}: use the URL {url}"
        )  # fmt: skip


@pytest.mark.parametrize("apart", [-1, 1, 2])
def test_versions_that_follow_each_other_work_together(serve: Callable[..., Server], apart: int) -> None:
    own = version("freestep")
    major, minor = own.split(".")[:2]
    other = f"{major}.{int(minor) + apart}.3"
    code, found = doctor(serve(answering(("200 OK", {"status": "ok", "version": other}), RUNS, READY)).url)
    if apart == 2:
        assert code == 1
        assert found["version"] == (
            "wrong", f"the service is freestep {other} and this is {own}: install the same on both"
        )  # fmt: skip
    else:
        assert code == 0
        assert found["version"] == ("ok", f"freestep {own} here and {other} there, which work together")


def test_a_store_that_is_away_is_said(start_service: Callable[..., ThreadService], tmp_path: Path) -> None:
    with store("valkey", tmp_path) as url:
        service = start_service(redis_url=url)
    code, found = doctor(service.url)
    assert code == 1
    assert found["redis"][0] == "wrong"
    assert found["redis"][1].endswith("see that the service's Redis runs, and its setting redis_url")
    assert found["service"][0] == found["version"][0] == found["token"][0] == "ok"


def answering(*answers: tuple[str, Any], date: str | None = None) -> Callable[[Peer], None]:
    """A service of which the answers to healthz, runs and readyz are given."""

    def script(peer: Peer) -> None:
        for status, document in answers:
            peer.head()
            lines = {"Date": date} if date else {}
            peer.answer(json.dumps(document), status, Content_Type="application/json", **lines)

    return script


HEALTHY = ("200 OK", {"status": "ok", "version": version("freestep")})
RUNS = ("200 OK", {"runs": []})
READY = ("200 OK", {"status": "ready", "device": "cuda:0", "problems": {}})


@pytest.mark.parametrize(
    ("answers", "date", "check", "said"),
    [
        ([("200 OK", {"status": "up"})], None, "service", "another server is at this URL"),
        ([("404 Not Found", {})], None, "service", "answered 404: '{}': no freestep service has this path"),
        ([("200 OK", {"status": "ok"}), RUNS, READY], None, "version", "does not say its version"),
        ([("200 OK", {"status": "ok", "version": "9.9"}), RUNS, READY], None, "version", "freestep 9.9 and this is"),
        ([HEALTHY, RUNS, READY], NOW, "clock", "ahead of the service's: set both"),
        (
            [HEALTHY, ("401 Unauthorized", Unauthenticated("no token").to_document(401)), READY],
            None, "token", "no token: see --token, FREESTEP_TOKEN or FREESTEP_TOKEN_FILE",
        ),
        (
            [HEALTHY, RUNS, ("503 Service Unavailable", CoordinatorUnavailable("is loading").to_document(503))],
            None, "redis", "is loading: see that the service's Redis runs",
        ),
        (
            [HEALTHY, RUNS, ("200 OK", {**READY[1], "problems": {"gpu[/0]": "damaged"}})],
            None, "runs", "gpu[/0]: damaged: the service's log has more",
        ),
        ([HEALTHY, RUNS, ("200 OK", ["ready"])], None, "device", "TypeError"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_service_is_said(
    serve: Callable[..., Server], answers: list[tuple[str, Any]], date: str | None, check: str, said: str
) -> None:
    code, found = doctor(serve(answering(*answers, date=date)).url)
    assert code == 1
    assert found[check][0] == "wrong"
    assert said in found[check][1]


def test_a_token_that_is_accepted_is_said(serve: Callable[..., Server]) -> None:
    code, found = doctor(serve(answering(HEALTHY, RUNS, READY)).url, "--token", "secret")
    assert code == 0
    assert found["token"] == ("ok", "accepted")
    assert found["clock"] == ("ok", "the service does not say its time")
    assert found["device"] == ("ok", "the service computes on cuda:0")


@pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")
def test_why_memory_is_not_shared_is_said(
    start_service: Callable[..., ThreadService], service: ThreadService, serve: Callable[..., Server]
) -> None:
    def said(url: str, **environment: str) -> str:
        verdict, text = doctor(url, **environment)[1]["memory"]
        assert verdict == "ok"
        return text.removeprefix("bodies go over connections: ")

    assert said(start_service(shared_memory=False).url) == "the service shares no memory"
    assert said(service.url, FREESTEP_SHARED_MEMORY="false") == "FREESTEP_SHARED_MEMORY turns memory off"
    for name, text in ((f"freestep-{'0' * 32}", "not in this network namespace"), ("/x", "shares no memory")):
        ready = ("200 OK", {**READY[1], "shared_memory": name})
        assert text in said(serve(answering(HEALTHY, RUNS, ready)).url)


def test_a_service_without_tokens_needs_none(start_service: Callable[..., ThreadService]) -> None:
    code, found = doctor(start_service(insecure=True).url, FREESTEP_TOKEN="")
    assert code == 0
    assert found["token"] == ("ok", "none is needed")


def test_a_token_that_is_refused_is_said(service: ThreadService) -> None:
    code, found = doctor(service.url, FREESTEP_TOKEN=make_token("push"))
    assert code == 1
    assert found["token"][0] == "wrong"
    assert "is unknown, or was revoked" in found["token"][1] and "FREESTEP_TOKEN" in found["token"][1]
