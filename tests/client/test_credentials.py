"""Which token a client's requests carry: given, of the environment, of a file that changes, or left by the service."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from freestep import Client, Forbidden, InvalidSetting, Unauthenticated
from freestep.api.token_form import make_token
from freestep.api.token_places import is_loopback, token_place
from freestep.credentials import Credentials, credentials
from freestep.transport import Transport
from harness import AUTHORIZED, TOKEN, ThreadService

URL = httpx.URL("http://127.0.0.1:8000")
ONE, OTHER = make_token("push"), make_token("push")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("FREESTEP_TOKEN", "FREESTEP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def leave(url: str, text: str) -> Path:
    """Leaves a token where the service at a URL does."""
    parsed = httpx.URL(url)
    place = token_place(parsed.host, parsed.port or 80)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text + "\n")
    return place


def replace(file: Path, text: str) -> None:
    """Replaces a file by a new one, as secrets are."""
    (file.parent / "new").write_text(text)
    os.replace(file.parent / "new", file)


def test_the_nearest_source_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert credentials(None, URL).headers() == {}
    leave(str(URL), make_token("admin"))
    found = credentials(None, URL).token
    assert found is not None and found.startswith("fst_a_")
    (tmp_path / "token").write_text(f"{OTHER}\n")
    monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(tmp_path / "token"))
    assert credentials(None, URL).headers() == {"Authorization": f"Bearer {OTHER}"}
    monkeypatch.setenv("FREESTEP_TOKEN", "of-another-issuer")
    assert credentials(None, URL).token == "of-another-issuer"
    assert credentials(ONE, URL).token == ONE


def test_a_service_of_another_place_has_another_token() -> None:
    leave("http://127.0.0.1:8000", ONE)
    for url in ("http://localhost:8000", "http://[::1]:8000", f"http://{socket.gethostname().upper()}:8000"):
        assert credentials(None, httpx.URL(url)).token == ONE
    for url in ("http://127.0.0.1:8001", "http://example.org:8000", "http://127.0.0.1", "http://192.0.2.1:8000"):
        assert credentials(None, httpx.URL(url)).token is None
    leave("http://[2001:db8::1]:8000", OTHER)
    assert credentials(None, httpx.URL("http://[2001:db8::1]:8000")).token == OTHER


@pytest.mark.parametrize("host", ["../../etc", "a/b", "..", "a\\b", "A b"])
def test_a_place_is_in_its_folder(tmp_path: Path, host: str) -> None:
    place = token_place(host, 1)
    assert place.parent == tmp_path / "freestep" / "tokens"
    assert place.resolve() == place


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("a.localhost", True),
     ("0.0.0.0", False), ("192.168.0.1", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_loopback_is_known(host: str, is_own: bool) -> None:
    assert is_loopback(host) == is_own


def test_a_user_without_a_home_has_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert credentials(None, URL).token is None


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    now = 0.0
    file = tmp_path / "token"
    file.write_text(ONE)
    held = Credentials(None, file, is_watched=True, clock=lambda: now)
    assert held.headers() == {"Authorization": f"Bearer {ONE}"}
    replace(file, OTHER)
    assert held.headers() == {"Authorization": f"Bearer {ONE}"}
    now += 1
    assert held.headers() == {"Authorization": f"Bearer {OTHER}"}
    # While it is being replaced, or where it holds something else, the last one is kept.
    for content in ("two words", "fst_p_mistyped", "", None):
        file.unlink() if content is None else replace(file, content)
        now += 1
        assert held.headers() == {"Authorization": f"Bearer {OTHER}"}
    replace(file, ONE)
    assert held.renew() and held.token == ONE
    assert not held.renew()


@pytest.mark.parametrize("refusal", [Unauthenticated, Forbidden])
def test_a_refused_request_is_sent_again_with_another_token(tmp_path: Path, refusal: Any) -> None:
    file = tmp_path / "token"
    file.write_text(ONE)
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"].removeprefix("Bearer "))
        if seen[-1] == OTHER:
            return httpx.Response(200, json={"runs": []})
        replace(file, OTHER)
        return httpx.Response(401, json=refusal().to_document(401))

    http = httpx.Client(base_url="http://service.test", transport=httpx.MockTransport(answer))
    transport = Transport(http, 0.0, credentials=Credentials(ONE, file))
    assert transport.request("GET", "/v1/runs").document == {"runs": []}
    assert seen == [ONE, OTHER]
    # Without another one, it is the caller's to know.
    file.write_text(ONE)
    transport = Transport(http, 0.0, credentials=Credentials(ONE))
    with pytest.raises(refusal):
        transport.request("GET", "/v1/runs")
    transport.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [("two words", "visible ASCII"), ("schlüssel", "visible ASCII"), (ONE[:-1], "a token is fst_"),
     (ONE[:-1] + ("a" if ONE[-1] != "a" else "b"), "mistyped")],
    ids=["words", "accents", "short", "mistyped"],
)  # fmt: skip
def test_what_cannot_be_one_is_told_at_once_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, said: str
) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(InvalidSetting, match=said) as caught:
            Client("http://127.0.0.1:9", **options)
        assert text not in str(caught.value)
        return str(caught.value)

    assert "the argument token" in refused(token=text)
    (tmp_path / "token").write_text(text)
    monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(tmp_path / "token"))
    assert str(tmp_path / "token") in refused()
    monkeypatch.setenv("FREESTEP_TOKEN", text)
    assert "FREESTEP_TOKEN" in refused()


def test_a_client_of_ones_own_carries_it_too(service: ThreadService) -> None:
    for given, own in ({"token": TOKEN}, {}), ({}, AUTHORIZED):
        with Client(http=httpx.Client(base_url=service.url, headers=own), retry_for=0, **given) as client:
            client.runs()
    # Its own goes before.
    mine = httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {ONE}"})
    with Client(http=mine, token=TOKEN, retry_for=0) as client, pytest.raises(Unauthenticated):
        client.runs()
    Client(http=httpx.Client()).close()


def test_a_file_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(InvalidSetting, match=r"FREESTEP_TOKEN_FILE: .*/none cannot be read"):
        Client("http://127.0.0.1:9")
