"""Pushes of which only some shards have a part yet: they go on, or give way to others, and are forgotten in the end."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from redis import Redis

from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import ShardedApi, slug
from shards.runs import (
    NONE_LEFT,
    ONES,
    SHARDS,
    SLOTS,
    counting,
    goes_on,
    half_of_a_part,
    leftovers,
    parts_of,
    sharded,
    staged,
)

STALL_S = 1.0


@pytest.fixture(scope="module")
def stall_seconds() -> float:
    return STALL_S


def test_a_push_that_is_left_half_is_forgotten_with_its_lease(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    dead, alive, bodies = run.lease("dead"), run.lease("alive"), run.bodies(ONES)
    waits = under_way(partial(run.push_part, 1, dead, 0, "half", bodies[1]))
    wait_until(lambda: staged(redis, run, "half") == {1})
    for step in range(3):
        answers = run.push_parts(alive, step, f"whole-{step}", bodies)
        assert [answer.json()["step"] for answer in answers] == [step + 1] * SHARDS
    # Its time is up.
    redis.zadd(run.redis_key("leases"), {"dead": 1})
    assert slug(waits.result()) == "lease-expired"
    assert leftovers(redis, run) == NONE_LEFT
    assert slug(run.push_part(0, dead, 0, "half", bodies[0])) == "lease-expired"
    goes_on(run, alive, redis)
    assert run.status()["step"] == 4


def test_more_half_pushes_than_there_are_slots_do_not_block_the_others(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    bodies, alive = run.bodies(ONES), run.lease("alive")
    leases = [run.lease(f"dead-{number}") for number in range(SLOTS + 2)]
    waiting = [
        under_way(partial(run.push_part, number % SHARDS, lease, 0, f"half-{number}", bodies[number % SHARDS]))
        for number, lease in enumerate(leases)
    ]
    # Not all at one time: the first may have been put off by then.
    came: set[Any] = set()

    def have_all_come() -> bool:
        came.update(redis.hkeys(run.redis_key("staged")))
        return len(came) == len(leases)

    wait_until(have_all_come)
    answers = run.push_parts(alive, 0, "whole", bodies)
    assert [(answer.status_code, answer.json().get("step")) for answer in answers] == [(200, 1)] * SHARDS
    for lease in leases:
        run.http.delete(run.path(f"/leases/{lease['lease']}"))
    assert {slug(each.result()) for each in waiting} <= {"overloaded", "lease-expired"}
    goes_on(run, alive, redis)


@pytest.mark.slow
def test_pushes_that_come_slowly_keep_their_slots(nodes: list[ThreadService], redis: Redis) -> None:
    """For longer than half of a push may: all their parts are coming, as fast as they have to."""
    pieces, pause = 10, threading.Event()
    zeros = {"w": torch.zeros(480_000)}
    with sharded(nodes) as api:
        api.create(**counting(parameters=[{"name": "w", "shape": [480_000]}], durability="none"), tensors=zeros)
        bodies = api.bodies({"w": torch.ones(480_000)})

        def slowly(number: int, lease: Mapping[str, Any]) -> None:
            key = f"slow-{number}"
            rest = [under_way(partial(api.push_part, shard, lease, 0, key, bodies[shard])) for shard in (1, 2)]
            with half_of_a_part(api, 0, lease, key, bodies[0]) as (connection, half):
                size = len(half) // pieces + 1
                for begin in range(0, len(half), size):
                    pause.wait(3 * STALL_S / pieces)
                    connection.sendall(half[begin : begin + size])
                assert b" 200 OK" in connection.makefile("rb").readline()
            assert [each.result().status_code for each in rest] == [200, 200]

        leases = [api.lease(f"slow-{number}") for number in range(SLOTS)]
        slow = [partial(slowly, number, lease) for number, lease in enumerate(leases)]

        def last() -> None:
            lease = api.lease("last")
            wait_until(lambda: len(redis.hkeys(api.redis_key("staged"))) == SLOTS)
            assert {answer.status_code for answer in api.push_parts(lease, 0, "last", bodies)} == {200}

        at_once(*slow, last)
        assert api.status()["step"] == SLOTS + 1


def test_another_part_may_be_retried_while_the_rest_waits(run: ShardedApi, redis: Redis) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    waits = [under_way(partial(run.push_part, shard, lease, 0, "cut", bodies[shard])) for shard in (0, 1)]
    wait_until(lambda: staged(redis, run, "cut") == {0, 1})
    with half_of_a_part(run, 2, lease, "cut", bodies[2]):
        wait_until(lambda: 2 in parts_of(redis, run, "cut"))
    wait_until(lambda: 2 not in parts_of(redis, run, "cut"))
    assert staged(redis, run, "cut") == {0, 1}
    assert run.push_part(2, lease, 0, "cut", bodies[2]).json()["step"] == 1
    assert [each.result().json()["step"] for each in waits] == [1, 1]
    goes_on(run, lease, redis)
