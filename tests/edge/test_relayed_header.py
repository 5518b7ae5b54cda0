"""`Freestep-Relayed` has an effect where the service's own processes have signed it, and nowhere else."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch

from edge.answers import dialled
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.coordination.secret import SECRET_KEY
from harness import OWN_HEAD, ThreadService, store
from meanwhile import wait_until
from plain_calls import SGD, Api, slug

NUMEL = 8 * 1024 * 1024
"""Elements of a model that no socket's buffers hold."""


def signed(secret: str, target: str, method: str = "GET") -> str:
    return hmac.new(secret.encode(), f"{method} {target}".encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def nodes(start_service: Callable[..., ThreadService], tmp_path: Path) -> Iterator[list[ThreadService]]:
    """Two services, of which the first owns the run; they soon give up readers that stall."""
    with store("valkey", tmp_path) as url:
        yield [
            start_service(tmp_path / name, redis_url=url, checkpoint_url=str(tmp_path / "kept"), stall_seconds=0.5)
            for name in ("one", "two")
        ]


@pytest.fixture
def api(nodes: list[ThreadService]) -> Iterator[Api]:
    made = Api(nodes[0].url)
    spec = {"optimizer": SGD, "parameters": [{"name": "w", "shape": [NUMEL]}], "durability": "none"}
    assert made.http.put(made.path(), json={"aggregation": {"policy": "async"}, **spec}).status_code == 201
    body = safetensors.torch.save({"w": torch.zeros(NUMEL)})
    assert (
        made.http.put(made.path("/parameters"), content=body, headers={"Content-Type": MEDIA_TYPE}).status_code == 201
    )
    yield made
    made.http.close()


def secret_of(node: ThreadService) -> str:
    with node.redis() as redis:
        return str(redis.get(SECRET_KEY))


def test_who_has_not_signed_may_not_stall_for_long(
    nodes: list[ThreadService], api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    owner = api.http.get(api.path("/topology")).json()["shards"][0]["url"]
    target, secret = api.path("/parameters?point=x"), secret_of(nodes[0])
    good = signed(secret, target)
    others = [
        "1",
        "",
        signed(secret, api.path("/parameters?point=y")),
        signed(secret, target, "HEAD"),
        signed(secrets.token_hex(32), target),
        good.upper(),
        good[:-1],
    ]

    def aborted() -> int:
        return sum("read nothing for" in record.getMessage() for record in caplog.records)

    caplog.set_level(logging.WARNING)
    with ExitStack() as stack:

        def stall(signature: str) -> None:
            peer = stack.enter_context(dialled(owner))
            peer.send(f"GET {target} HTTP/1.1\r\n{OWN_HEAD}Freestep-Relayed: {signature}\r\n\r\n".encode())

        stall(good)
        for number, signature in enumerate(others):
            stall(signature)
            wait_until(lambda number=number: aborted() == number + 1)  # type: ignore[misc]
        # That of the service's own process goes on, which began before all others; and so does another one.
        stall(others[0])
        wait_until(lambda: aborted() == len(others) + 1)
        assert "read nothing" in caplog.text


def test_a_signature_of_another_secret_has_no_effect(nodes: list[ThreadService], api: Api) -> None:
    owner = api.http.get(api.path("/topology")).json()["shards"][0]["url"]
    other = next(node for node in nodes if node.url != owner)
    target, old = api.path("/parameters?shard=0&of=1"), secret_of(nodes[0])

    def asked(secret: str) -> httpx.Response:
        return api.http.get(f"{other.url}{target}", headers={"Freestep-Relayed": signed(secret, target)})

    # It takes the caller for a process of the service, and sends the request on to nobody.
    assert slug(asked(old)) == "shard-unavailable"
    new = secrets.token_hex(32)
    with other.redis() as redis:
        redis.set(SECRET_KEY, new)
    wait_until(lambda: asked(old).status_code == 200)
    assert slug(asked(new)) == "shard-unavailable"
    assert asked(old).status_code == 200
