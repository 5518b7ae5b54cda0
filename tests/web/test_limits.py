"""No route reads more of a body than it may, whatever the sender calls it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from asgi_calls import Sender, call, scope_of
from documented import openapi
from freestep.errors import RunNotFound
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.app import create_app
from freestep_service.settings import Settings
from freestep_service.web.json_bodies import SMALL, JsonBodies
from freestep_service.web.limits import LONGEST_SPEC

CHUNK = bytes(1024 * 1024)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The service's routes, in front of a registry without runs."""

    async def find(name: str) -> Any:
        raise RunNotFound

    made = create_app(Settings())
    made.state.context = SimpleNamespace(
        registry=SimpleNamespace(find=find),
        settings=Settings(insecure=True),
        audit=SimpleNamespace(note=lambda deed: None),
        tokens=SimpleNamespace(is_good=lambda token: True),
        json_bodies=JsonBodies(30.0),
    )
    return made


def operations() -> Iterator[tuple[str, str]]:
    for path, methods in openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path.format(run="r", lease="l", step=1, id="i", name="train", worker="w")


@pytest.mark.parametrize("media_type", ["application/json", MEDIA_TYPE, "text/plain", None])
@pytest.mark.parametrize(
    ("method", "path"), [each for each in operations() if each[1].startswith("/v1/runs/")], ids=" ".join
)
def test_an_endless_body_is_read_up_to_the_bound(app: FastAPI, method: str, path: str, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    sender = Sender(repeat(CHUNK))
    answer = call(app, scope_of(method, path, headers), sender)
    longest = LONGEST_SPEC if (method, path) == ("PUT", "/v1/runs/r") else SMALL
    assert sender.sent <= longest + len(CHUNK)
    assert answer.headers["content-type"] == "application/problem+json"
    if sender.sent:
        assert (answer.status, answer.json()["limit"]) == (413, longest)


@pytest.mark.parametrize("media_type", ["application/json", MEDIA_TYPE])
def test_a_spec_is_read_up_to_the_bound(app: FastAPI, media_type: str) -> None:
    sender = Sender([CHUNK] * 16)
    answer = call(app, scope_of("PUT", "/v1/runs/r", {"content-type": media_type}), sender)
    assert (sender.sent, answer.status) == (LONGEST_SPEC, 400 if media_type == "application/json" else 422)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/runs/r"),
        # These have no use for one.
        ("DELETE", "/v1/runs/r"),
        ("DELETE", "/v1/runs/r/leases/l"),
        ("DELETE", "/v1/runs/r/workers/w"),
        ("DELETE", "/v1/tokens/i"),
        ("POST", "/v1/runs/r/checkpoints"),
        ("POST", "/v1/runs/r/checkpoints/1/restore"),
    ],
    ids=" ".join,
)
def test_a_body_that_ends_with_its_connection_is_refused(app: FastAPI, method: str, path: str) -> None:
    class Leaving(Sender):
        async def receive(self) -> dict[str, Any]:
            return await super().receive() if not self.sent else {"type": "http.disconnect"}

    answer = call(app, scope_of(method, path), Leaving([b"{"]))
    assert (answer.status, answer.json()["type"]) == (400, "urn:freestep:problem:malformed-request")
    assert "the end of the body" in answer.json()["detail"]
