"""The client against servers that answer as proxies and failing services do, and against none."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from freestep import (
    Claim,
    Client,
    CoordinatorUnavailable,
    Flat,
    Run,
    ServiceUnreachable,
    StorageUnavailable,
    UnexpectedResponse,
)
from freestep.api.models import ParameterSpec
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import MEDIA_TYPE
from meanwhile import end

MANIFEST = Manifest([ParameterSpec(name="w", shape=(1,))])


def test_nobody_there_is_said_after_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(url, retry_for=0.3) as client, pytest.raises(ServiceUnreachable, match="did not answer"):
        client.runs()


class Answering(http.server.BaseHTTPRequestHandler):
    """Returns the responses that its server lists, one after another."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Cookie"]))  # type: ignore[attr-defined]
        status, headers, body = self.server.answers.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def asked() -> list[tuple[str, str | None]]:
    """The target and the cookie of each request to the `answering` server."""
    return []


@pytest.fixture
def answering(asked: list[tuple[str, str | None]]) -> Iterator[Callable[..., str]]:
    """Starts a server that returns listed responses; returns its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def listed(*answers: tuple[int, dict[str, str], bytes]) -> str:
        server.answers = list(answers)  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield listed
    server.shutdown()
    end(thread)
    server.server_close()


BUSY = (503, {"Retry-After": "0"}, b'{"type": "urn:freestep:problem:coordinator-unavailable", "detail": "away"}')


def test_a_busy_service_is_asked_again(answering: Callable[..., str]) -> None:
    with Client(answering(BUSY, BUSY, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_a_busy_service_is_not_asked_forever(answering: Callable[..., str]) -> None:
    asked_to_wait = (503, {"Retry-After": "60"}, BUSY[2])
    with Client(answering(asked_to_wait), retry_for=20) as client, pytest.raises(CoordinatorUnavailable) as caught:
        client.runs()
    assert caught.value.retry_after == 60


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.create({"parameters": [{"name": "w", "shape": [1]}]}),
        lambda run: run.checkpoint(),
        lambda run: run.restore(1),
        lambda run: run.reshard(2),
        lambda run: run.delete(),
        lambda run: run.initialize(Flat(MANIFEST)),
        lambda run: run.push(Flat(MANIFEST), Claim("lease", 1, 0)),
        lambda run: run.exchange(Flat(MANIFEST), Claim("lease", 1, 0), Flat(MANIFEST)),
    ],
)
def test_full_storage_is_raised_as_such_and_at_once(call: Callable[[Run], object]) -> None:
    seen: list[str] = []

    def full(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(507, json=StorageUnavailable("no space left", free_bytes=7).to_document(507))

    http = httpx.Client(base_url="http://service.test", transport=httpx.MockTransport(full))
    with (
        Client(http=http, retry_for=3600) as client,
        pytest.raises(StorageUnavailable, match="no space left") as caught,
    ):
        call(client.run("run"))
    assert caught.value.extensions == {"free_bytes": 7}
    # A deletion asks first which run it is.
    assert seen in (["PUT"], ["POST"], ["GET", "DELETE"])


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>a proxy's page</html>"),
        (404, {}, b'{"type": "about:blank", "title": "Not Found"}'),
        (500, {}, b"[]"),
        (307, {"Location": "/elsewhere"}, b""),
        (200, {}, b'{"items": []}'),
        (200, {}, b""),
    ],
)
def test_what_is_not_freestep_is_unexpected(
    answering: Callable[..., str], answer: tuple[int, dict[str, str], bytes]
) -> None:
    with Client(answering(answer)) as client, pytest.raises(UnexpectedResponse):
        client.runs()


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
@pytest.mark.parametrize("lines", [{}, {"Retry-After": "0"}])
def test_a_gateway_whose_service_is_away_is_asked_again(
    answering: Callable[..., str], status: int, lines: dict[str, str]
) -> None:
    away = (status, lines, b"<html>the service restarts</html>")
    with Client(answering(away, away, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_a_gateway_is_not_asked_forever(answering: Callable[..., str]) -> None:
    away = (502, {"Retry-After": "60"}, b"Bad Gateway")
    with Client(answering(away), retry_for=20) as client, pytest.raises(ServiceUnreachable, match="502: 'Bad Gateway'"):
        client.runs()


def test_a_pull_that_is_answered_by_another_server_is_unexpected(answering: Callable[..., str]) -> None:
    with Client(answering((200, {"Content-Type": "application/json"}, b"{}"))) as client:
        with pytest.raises(UnexpectedResponse, match="freestep-epoch"):
            client.run("run").pull_into(Flat(MANIFEST))


def test_a_service_that_answers_of_the_newest_step_does_not_read_checkpoints(answering: Callable[..., str]) -> None:
    body = safetensors.torch.save({slot.name: torch.zeros(slot.shape) for slot in MANIFEST.slots})
    lines = {"Content-Type": MEDIA_TYPE, "Freestep-Epoch": "1", "Freestep-Step": "9"}
    with Client(answering((200, lines, body), (200, lines, body))) as client:
        assert client.run("run").pull_into(Flat(MANIFEST)).step == 9
        with pytest.raises(UnexpectedResponse, match="of step 9 and not of the checkpoint of step 3"):
            client.run("run").pull_into(Flat(MANIFEST), checkpoint=3)


@pytest.mark.parametrize("seconds", ["-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_no_count_of_seconds_is_ignored(answering: Callable[..., str], seconds: str) -> None:
    busy = (503, {"Retry-After": seconds}, BUSY[2])
    with Client(answering(busy, (200, {}, b'{"runs": []}')), retry_for=20) as client:
        assert client.runs() == []


def test_what_the_caller_was_about_does_not_end_its_retries(answering: Callable[..., str]) -> None:
    try:
        raise ssl.SSLCertVerificationError("of another server")
    except ssl.SSLCertVerificationError:
        with Client(answering(BUSY, (200, {}, b'{"runs": []}')), retry_for=20) as client:
            assert client.runs() == []


def test_cookies_are_sent_back(answering: Callable[..., str], asked: list[tuple[str, str | None]]) -> None:
    none, lane = {}, {"Set-Cookie": "lane=7"}
    with Client(answering(*[(200, lines, b'{"runs": []}') for lines in (none, lane, none)])) as client:
        for _ in range(3):
            client.runs()
    assert [cookie for _, cookie in asked] == [None, None, "lane=7"]


def test_parameters_of_a_client_of_ones_own_are_sent_too(
    answering: Callable[..., str], asked: list[tuple[str, str | None]]
) -> None:
    with Client(http=httpx.Client(base_url=answering((200, {}, b"")), params={"lane": "7"})) as client:
        with pytest.raises(UnexpectedResponse):
            client.run("run").pull_into(Flat(MANIFEST))
    assert asked == [("/v1/runs/run/parameters?lane=7&point=x&dtype=F32&min_step=0", None)]
