"""Requests that services relay to each other are signed with the secret that they share."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from freestep_service.coordination.secret import SECRET_KEY
from freestep_service.web.json_bodies import SMALL
from harness import ThreadService
from plain_calls import ShardedApi, slug
from raw_pushes import answered, connected, head_of_a_push


def path_of(run: ShardedApi, shard: int) -> str:
    return f"{run.path('/parameters')}?shard={shard}&of={len(run.shards)}"


@pytest.fixture
def elsewhere(nodes: list[ThreadService], run: ShardedApi) -> tuple[int, str]:
    """A shard, and the URL of a service that does not own it."""
    owner = run.shards[0]["url"]
    return 0, next(node.url for node in nodes if node.url != owner)


def signature(node: ThreadService, target: str) -> str:
    return str(node.app.state.context.relay._secret.sign(f"GET {target}".encode()))


@pytest.mark.parametrize("forged", ["1", "0" * 64])
def test_a_forged_header_is_ignored(run: ShardedApi, elsewhere: tuple[int, str], forged: str) -> None:
    shard, url = elsewhere
    answer = run.http.get(f"{url}{path_of(run, shard)}", headers={"Freestep-Relayed": forged})
    assert answer.status_code == 200
    assert answer.content == run.http.get(f"{run.shards[shard]['url']}{path_of(run, shard)}").content


def test_a_signed_request_is_not_relayed_again(
    nodes: list[ThreadService], run: ShardedApi, elsewhere: tuple[int, str]
) -> None:
    shard, url = elsewhere
    target = path_of(run, shard)
    for node in nodes:
        headers = {"Freestep-Relayed": signature(node, target)}
        # It is not sent on to the shard's owner.
        assert slug(run.http.get(f"{url}{target}", headers=headers)) == "shard-unavailable"
        assert run.http.get(f"{url}{path_of(run, shard)}&cut=x", headers=headers).status_code == 200


def test_the_secret_is_in_redis_and_in_no_answer(nodes: list[ThreadService], run: ShardedApi, redis: Redis) -> None:
    secret = redis.get(SECRET_KEY)
    assert isinstance(secret, str) and len(secret) == 64
    assert len({signature(node, "/") for node in nodes}) == 1
    assert secret not in run.http.get("/metrics").text


@pytest.mark.parametrize("length", [100, 10**6])
def test_a_claim_is_decided_before_its_body_is_sent_on(
    run: ShardedApi, elsewhere: tuple[int, str], length: int
) -> None:
    shard, url = elsewhere
    headers = run.headers(run.lease(), 0, "key") | {"Freestep-Lease": "none"}
    target = f"{run.path('/gradients')}?shard={shard}&of={len(run.shards)}"
    with connected(url) as connection:
        # A small body comes with its head, and costs little.
        connection.sendall(head_of_a_push(target, headers, length) + (bytes(length) if length < SMALL else b""))
        assert json.loads(answered(connection))["type"].endswith("lease-expired")
