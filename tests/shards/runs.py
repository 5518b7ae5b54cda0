"""Runs of several shards that count their pushes: pushes to them, and what these leave in Redis."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from redis import Redis

from harness import ThreadService
from meanwhile import wait_until
from plain_calls import SGD, Api, ShardedApi
from raw_pushes import connected, head_of_a_push

SHARDS = 3
SLOTS = 4
"""Pushes of a run that may be on their way at once."""
SIZES = {"w": (40, 5), "b": (7,), "e": (0, 4), "s": ()}
ONES = {name: torch.ones(size) for name, size in SIZES.items()}
ZEROS = {name: torch.zeros(size) for name, size in SIZES.items()}


def counting(shards: int = SHARDS, **changes: Any) -> dict[str, Any]:
    """The spec of a run that subtracts every gradient from its parameters."""
    return {
        "optimizer": SGD,
        "aggregation": {"policy": "async"},
        "parameters": [{"name": name, "shape": list(size)} for name, size in SIZES.items()],
        "shards": shards,
        **changes,
    }


@contextmanager
def sharded(nodes: list[ThreadService], number: int = 0) -> Iterator[ShardedApi]:
    """A new run, requested at one of the nodes; it is deleted in the end."""
    api = ShardedApi(nodes[number].url)
    try:
        yield api
        api.http.delete(api.path())
    finally:
        api.http.close()


def parts_of(redis: Redis, api: Api, key: str) -> dict[int, dict[str, Any]]:
    """The parts of a pending push, by shard."""
    text: Any = redis.hget(api.redis_key("staged"), key)
    parts = json.loads(text)["parts"] if text else {}
    # An empty table of Lua's is an empty list.
    return {int(shard): part for shard, part in parts.items()} if parts else {}


def staged(redis: Redis, api: Api, key: str) -> set[int]:
    """The shards that have staged their parts of a push."""
    return {shard for shard, part in parts_of(redis, api, key).items() if "digest" in part}


def leftovers(redis: Redis, api: Api) -> dict[str, Any]:
    """What Redis keeps of pushes and pulls under way."""
    left: dict[str, Any] = {name: redis.hgetall(api.redis_key(name)) for name in ("pending", "staged", "cuts")}
    left["queue"] = redis.lrange(api.redis_key("queue"), 0, -1)
    left["in_flight"] = int(redis.hget(api.redis_key("run"), "in_flight") or 0)
    return left


NONE_LEFT: dict[str, Any] = {"pending": {}, "staged": {}, "cuts": {}, "queue": [], "in_flight": 0}


def wholly(api: ShardedApi, point: str, nodes: list[ThreadService]) -> bytes:
    """The tensors' bytes of a whole point, which must be the same from all nodes."""
    bodies = []
    for node in nodes:
        answer = api.http.get(f"{node.url}{api.path('/parameters')}", params={"point": point})
        assert answer.status_code == 200, answer.text
        bodies.append(answer.content)
    assert len(set(bodies)) == 1
    return bytes(bodies[0][8 + int.from_bytes(bodies[0][:8], "little") :])


def goes_on(api: ShardedApi, lease: Mapping[str, Any], redis: Redis) -> None:
    """A good push is applied, and nothing is left behind."""
    step = api.status()["step"]
    answers = api.push_parts(lease, step, uuid.uuid4().hex, api.bodies(ONES))
    assert [answer.status_code for answer in answers] == [200] * SHARDS, [answer.text for answer in answers]
    assert [(answer.json()["decision"], answer.json()["step"]) for answer in answers] == [
        ("applied", step + 1)
    ] * SHARDS
    wait_until(lambda: leftovers(redis, api) == NONE_LEFT)


def spoiled(api: ShardedApi, shard: int, value: float) -> list[bytes]:
    """Bodies of ones, with one element of a shard's part replaced."""
    tensors = {name: tensor.clone() for name, tensor in ONES.items()}
    first = next(each for each in api.shards[shard]["slices"] if each["begin"] < each["end"])
    tensors[first["name"]].reshape(-1)[first["begin"]] = value
    return api.bodies(tensors)


@contextmanager
def half_of_a_part(
    api: ShardedApi, shard: int, lease: Mapping[str, Any], key: str, body: bytes
) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection on which half of a part's body was sent; and the other half."""
    target = f"{api.path('/gradients')}?shard={shard}&of={len(api.shards)}"
    head = head_of_a_push(target, {**api.headers(lease, 0, key), "Connection": "close"}, len(body))
    with connected(api.shards[shard]["url"]) as connection:
        connection.sendall(head + body[: len(body) // 2])
        yield connection, body[len(body) // 2 :]
