"""A run of several shards is changed, paused and resumed as a whole, by whichever service is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from redis import Redis

from control_calls import change, end_worker, patch
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import Api, ShardedApi, slug
from shards.runs import NONE_LEFT, ONES, SHARDS, ZEROS, counting, goes_on, leftovers, sharded, staged, wholly


@pytest.mark.parametrize("number", range(SHARDS))
def test_every_service_changes_all_shards(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, connect: Callable[..., Api], number: int
) -> None:
    lease = run.lease()
    goes_on(run, lease, redis)
    assert change(connect(nodes[number].url, run.run), optimizer={"lr": 0.5})["control"]["optimizer"] == {"lr": 0.5}
    goes_on(run, lease, redis)
    for node in nodes:
        asked = connect(node.url, run.run)
        wait_until(lambda asked=asked: asked.status()["scheduled_lr"] == {"default": 0.5})  # type: ignore[misc]
        assert asked.status()["control"]["optimizer"] == {"lr": 0.5}
    weights = run.pull("x")[0]
    assert {float(value) for tensor in weights.values() for value in tensor.reshape(-1)} == {-1.5}


def test_a_service_without_a_shard_asks_an_owner(
    nodes: list[ThreadService], redis: Redis, connect: Callable[..., Api]
) -> None:
    with sharded(nodes) as run:
        run.create(**counting(shards=1, durability="none"), tensors=ZEROS)
        others = [node for node in nodes if node.url != run.shards[0]["url"]]
        lease = run.lease()
        change(connect(others[0].url, run.run), optimizer={"lr": 0.5})
        assert slug(patch(connect(others[1].url, run.run), optimizer={"lr": -1.0})) == "invalid-spec"
        assert end_worker(connect(others[1].url, run.run), ban=60).json()["ended"] is True
        assert slug(run.push_parts(lease, 0, "late", run.bodies(ONES))[0]) == "lease-expired"
        assert redis.hget(run.redis_key("run"), "control")


def test_parts_that_wait_when_the_run_is_paused_are_refused_on_all_shards(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    waiting = [under_way(partial(run.push_part, shard, lease, 0, "early", bodies[shard])) for shard in (0, 1)]
    wait_until(lambda: staged(redis, run, "early") == {0, 1})
    change(run, paused=True)
    before = [wholly(run, point, nodes) for point in "xyz"]
    assert slug(run.push_part(2, lease, 0, "early", bodies[2])) == "run-paused"
    assert [slug(each.result()) for each in waiting] == ["run-paused"] * 2
    assert [slug(answer) for answer in run.push_parts(lease, 0, "early", bodies)] == ["run-paused"] * SHARDS
    assert slug(run.push(lease, 0, "whole", tensors=ONES)) == "run-paused"
    assert leftovers(redis, run) == NONE_LEFT
    assert [wholly(run, point, nodes) for point in "xyz"] == before
    change(run, paused=False)
    answers = run.push_parts(lease, 0, "early", bodies)
    assert [answer.json()["decision"] for answer in answers] == ["applied"] * SHARDS
    goes_on(run, lease, redis)


def test_a_take_over_keeps_what_was_changed(nodes: list[ThreadService]) -> None:
    """By another number of shards: all of them load what was written."""
    with sharded(nodes) as steered:
        steered.create(**counting(durability="checkpoint"), tensors=ZEROS)
        before = steered.pull("x")[0]
        change(steered, optimizer={"lr": 0.25}, paused=True)
        end_worker(steered, "bad", ban=3600)
        assert steered.http.post(steered.path("/reshard"), json={"shards": 2}).status_code == 200
        status = steered.status()
        assert (status["control"]["optimizer"], status["control"]["paused"]) == ({"lr": 0.25}, True)
        assert list(status["control"]["suspended"]) == ["bad"]
        change(steered, paused=False)
        steered.shards = steered.http.get(steered.path("/topology")).json()["shards"]
        lease = steered.lease()
        answers = steered.push_parts(lease, 0, "after", steered.bodies(ONES))
        assert [answer.json()["step"] for answer in answers] == [1, 1]
        after = steered.pull("x")[0]
        assert all(bool((before[name] - after[name] == 0.25).all()) for name in before)
