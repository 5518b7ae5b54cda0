"""Stale synchronous parallel over several processes, with workers that are processes too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from forked import Script
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import ShardedApi
from shards.runs import NONE_LEFT, ONES, SHARDS, ZEROS, counting, leftovers, sharded

SSP = {"policy": "ssp", "slack": 2}
STRAGGLER = Path(__file__).with_name("straggler.py")


def is_held(api: ShardedApi, nodes: list[ThreadService], redis: Redis) -> bool:
    """Whether a push has reached the services, and has not been admitted by Redis."""
    runs = [node.app.state.registry.get(api.run) for node in nodes]
    has_come = any(owned.pushes._flights for run in runs for owned in run.owned.values())
    return has_come and not redis.hlen(api.redis_key("pending"))


@pytest.mark.parametrize("leaves", [False, True])
def test_shards_are_told_when_the_slowest_moves(nodes: list[ThreadService], redis: Redis, leaves: bool) -> None:
    with sharded(nodes) as api:
        api.create(**counting(aggregation=SSP, durability="none"), tensors=ZEROS)
        fast, slow = api.lease("fast"), api.lease("slow")
        bodies = api.bodies(ONES)
        for number in range(3):
            assert {answer.status_code for answer in api.push_parts(fast, 0, f"key-{number}", bodies)} == {200}
        # From a node that may not be shard 0's.
        early = [under_way(partial(api.push_part, shard, fast, 0, "early", bodies[shard])) for shard in range(SHARDS)]
        wait_until(lambda: is_held(api, nodes, redis))
        if leaves:
            api.http.delete(f"{nodes[-1].url}{api.path('/leases/' + slow['lease'])}")
        else:
            assert {answer.json()["step"] for answer in api.push_parts(slow, 0, "slow", bodies)} == {4}
        assert {each.result().json()["step"] for each in early} == {4 if leaves else 5}
        wait_until(lambda: leftovers(redis, api) == NONE_LEFT)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, SHARDS])
def test_a_worker_that_is_killed_is_waited_for_no_longer(nodes: list[ThreadService], redis: Redis, shards: int) -> None:
    with sharded(nodes) as api:
        api.create(**counting(shards, aggregation=SSP, lease_ttl_ms=1500, durability="none"), tensors=ZEROS)
        with Script(STRAGGLER, api.url, api.run, "slow", "1") as slow:
            assert slow.read_line() == "1"
            with Script(STRAGGLER, api.url, api.run, "fast", "8") as fast:
                assert [fast.read_line() for _ in range(3)] == ["2", "3", "4"]
                wait_until(lambda: is_held(api, nodes, redis))
                assert api.status()["step"] == 4
                slow.kill()
                assert [fast.read_line() for _ in range(5)] == ["5", "6", "7", "8", "9"]
                fast.close_stdin()
                assert fast.wait() == 0
        assert api.status()["step"] == 9
