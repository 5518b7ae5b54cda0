"""Which token a client's requests carry: given, of the environment, of a file that changes, or left by the service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from freestep import Client, Forbidden, InvalidSetting, Unauthenticated, listeners
from freestep.api.token_form import make_token
from freestep.api.token_places import is_loopback, token_place
from freestep.credentials import Credentials, credentials
from freestep.listeners import is_users_own
from freestep.transport import Transport
from harness import AUTHORIZED, TOKEN, ThreadService
from meanwhile import DEADLINE_S, at_once

ONE, OTHER = make_token("push"), make_token("push")
STRANGER = 12345
"""The ID of another user."""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("FREESTEP_TOKEN", "FREESTEP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 on which this user listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def url(port: int) -> httpx.URL:
    return httpx.URL(f"http://127.0.0.1:{port}")


Listens = Callable[..., int]


@pytest.fixture
def stranger() -> Iterator[Listens]:
    """Has another user listen at an address, and returns the port."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("to be another user takes root, and to tell them apart takes Linux")
    started: list[subprocess.Popen[str]] = []
    # It becomes the other user by itself, who may not be able to read the interpreter.
    program = "import os, sys, time, socket; os.setuid(int(sys.argv[1]))\n"
    program += "listener = socket.create_server((sys.argv[2], int(sys.argv[3])), family=int(sys.argv[4]))\n"
    program += "print(listener.getsockname()[1], flush=True); sys.stdin.read()"

    def listen(address: str, port: int = 0) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        command = [sys.executable, "-c", program, str(STRANGER), address, str(port), str(int(family))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield listen
    for process in started:
        process.communicate(timeout=30)


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


def test_the_nearest_source_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: httpx.URL) -> None:
    assert credentials(None, url).headers() == {}
    leave(str(url), make_token("admin"))
    found = credentials(None, url).token
    assert found is not None and found.startswith("fst_a_")
    (tmp_path / "token").write_text(f"{OTHER}\n")
    monkeypatch.setenv("FREESTEP_TOKEN_FILE", str(tmp_path / "token"))
    assert credentials(None, url).headers() == {"Authorization": f"Bearer {OTHER}"}
    monkeypatch.setenv("FREESTEP_TOKEN", "of-another-issuer")
    assert credentials(None, url).token == "of-another-issuer"
    assert credentials(ONE, url).token == ONE


def test_a_service_of_another_place_has_another_token() -> None:
    machine = {token_place(host, 8000) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname())}
    assert len(machine) == 1
    others = [("127.0.0.1", 8001), ("127.0.0.9", 8000), ("example.org", 8000), ("127.0.0.1", 80), ("192.0.2.1", 8000)]
    assert len(machine | {token_place(*other) for other in others}) == 6
    # Of other machines nobody can tell who listens there.
    leave("http://[2001:db8::1]:8000", OTHER)
    assert credentials(None, httpx.URL("http://[2001:db8::1]:8000")).token == OTHER


def test_what_is_left_is_sent_to_nobody_who_may_be_another_user(
    port: int, stranger: Listens, caplog: pytest.LogCaptureFixture
) -> None:
    place = leave(f"http://127.0.0.1:{port}", ONE)
    own = httpx.URL(f"http://127.0.0.1:{port}")
    assert credentials(None, own).token == ONE
    # Another user at another loopback address hears nothing, and changes nothing at this one.
    stranger("127.0.0.9", port)
    leave(f"http://127.0.0.9:{port}", ONE)
    assert credentials(None, httpx.URL(f"http://127.0.0.9:{port}")).token is None
    assert f"of the user with ID {STRANGER}" in caplog.text and ONE not in caplog.text
    assert credentials(None, own).token == ONE
    # Nor one who has a port that a killed service had, under any name.
    taken = stranger("0.0.0.0")
    for host in ("127.0.0.1", "localhost", "127.0.0.9", "0.0.0.0"):
        place = leave(f"http://{host}:{taken}", ONE)
        assert credentials(None, httpx.URL(f"http://{host}:{taken}")).token is None
        assert place.exists()


def test_a_name_may_mean_addresses_of_several_users(
    port: int, stranger: Listens, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def resolve_both(host: str, *rest: Any, **options: Any) -> Any:
        # As most machines have it.
        hosts = ("::1", "127.0.0.1") if host == "localhost" else (host,)
        return [found for each in hosts for found in resolve(each, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve_both)
    assert is_users_own("localhost", port)
    try:
        stranger("::1", port)
    except ValueError:
        pytest.skip("there is no IPv6")
    assert not is_users_own("localhost", port)
    assert not is_users_own("::1", port)
    assert is_users_own("127.0.0.1", port)


def test_what_is_left_is_not_sent_while_nobody_listens(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
        assert is_users_own("127.0.0.1", free)
    assert not is_users_own("127.0.0.1", free)


@pytest.mark.parametrize("tables", [("none", "none"), (".", ".")], ids=["other systems", "unreadable"])
def test_where_nobody_tells_who_listens_it_is_believed(
    port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tables: tuple[str, str]
) -> None:
    monkeypatch.setattr(listeners, "_TABLES", tuple(tmp_path / each for each in tables))
    assert is_users_own("127.0.0.1", port)


def test_a_token_is_held_no_longer_when_its_port_has_gone_to_another(url: httpx.URL) -> None:
    file, owns = leave(str(url), ONE), [True]
    held = Credentials(None, file, may_send=lambda: owns[0])
    assert held.renew() and held.token == ONE
    owns[0] = False
    assert not held.renew() and held.headers() == {}
    owns[0] = True
    assert held.renew() and held.token == ONE


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


def test_a_user_without_a_home_has_none_left(monkeypatch: pytest.MonkeyPatch, url: httpx.URL) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert credentials(None, url).token is None


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


def test_requests_that_are_refused_together_are_all_sent_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(OTHER)
    both = threading.Barrier(2)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["Authorization"] == f"Bearer {OTHER}":
            return httpx.Response(200, json={"runs": []})
        both.wait(DEADLINE_S)
        return httpx.Response(401, json=Unauthenticated().to_document(401))

    http = httpx.Client(base_url="http://service.test", transport=httpx.MockTransport(answer))
    transport = Transport(http, 0.0, credentials=Credentials(ONE, file))
    answers = at_once(*2 * [lambda: transport.request("GET", "/v1/runs")])
    assert [each.document for each in answers] == 2 * [{"runs": []}]
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
