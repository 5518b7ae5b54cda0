"""A run of several shards decides what a run of one shard does, and holds what that holds, to the last bit.

That shards are a function of the log is tested on the shards themselves, in state/test_shards_as_one.py, for every
algorithm and policy. Here the same log comes about over HTTP: pushes of several workers are under way at once, in parts
that come in any order, and a few runs of every policy are compared.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from torch import Tensor

from freestep.api.models import RunSpec
from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import ShardedApi, persistently
from run_specs import HYPERPARAMETERS, POLICIES, run_specs, wishes_for
from shards.runs import NONE_LEFT, leftovers, sharded, staged, wholly

STEADY = settings(derandomize=True, deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Push:
    """A push of a round: its worker, its staleness, and the shard whose part of it comes last."""

    worker: int
    staleness: int
    narrow: bool
    samples: str | None
    last: int
    seed: int


@dataclass(frozen=True)
class Round:
    """Pushes under way at once, committed in their order; before them a worker may leave and come back.

    wish: a change of the run that is made while they are under way, a number for one of `wishes_for`.
    """

    pushes: list[Push]
    leaver: int | None
    wish: int | None
    changed_after: int = 0
    """How many of the pushes were decided before the run was changed."""


WORKERS = 3
pushes = st.builds(
    Push,
    worker=st.integers(0, WORKERS - 1),
    staleness=st.integers(0, 4),
    narrow=st.booleans(),
    samples=st.sampled_from([None, "1", "3", "0.25"]),
    last=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
rounds = st.lists(
    st.builds(
        Round,
        pushes=st.lists(pushes, min_size=1, max_size=3),
        leaver=st.one_of(st.none(), st.none(), st.integers(0, WORKERS - 1)),
        wish=st.one_of(st.none(), st.integers(0, 100)),
    ),
    min_size=4,
    max_size=6,
)


def randoms(spec: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {each["name"]: torch.randn(each["shape"], generator=generator) for each in spec["parameters"]}


class Player:
    """Plays rounds on a run."""

    def __init__(self, api: ShardedApi, nodes: list[ThreadService], redis: Redis, spec: dict[str, Any]) -> None:
        self.api = api
        self.redis = redis
        self.spec = spec
        self.urls = [None, *(node.url for node in nodes)]
        self.chance = random.Random(0)
        self.leases = [self.lease(number) for number in range(WORKERS)]
        self.receipts: list[str] = []
        self.wishes = wishes_for(RunSpec.model_validate(spec))

    def lease(self, number: int) -> dict[str, Any]:
        return self.api.lease(f"worker-{number}", ttl_ms=600_000)

    def begin(self, played: Round) -> int:
        """Has the round's leaver leave and come back; the run's step then."""
        if played.leaver is not None:
            lease = self.leases[played.leaver]
            assert self.api.http.delete(self.api.path(f"/leases/{lease['lease']}")).status_code == 204
            self.leases[played.leaver] = self.lease(played.leaver)
        return int(self.redis.hget(self.api.redis_key("run"), "step") or 0)

    def change(self, played: Round) -> None:
        if played.wish is not None:
            url = self.chance.choice(self.urls) or self.api.url
            wish = self.wishes[played.wish % len(self.wishes)]
            answer = persistently(lambda: self.api.http.patch(f"{url}{self.api.path()}", json=wish))
            assert answer.status_code == 200, answer.text

    def sender(self, push: Push, step: int, key: str) -> Callable[[int], httpx.Response]:
        """A function that sends a part of a push: to its owner, or through another service."""
        dtype = torch.bfloat16 if push.narrow else None
        bodies = self.api.bodies(randoms(self.spec, push.seed), dtype)
        more = {"Freestep_Samples": push.samples} if push.samples else {}
        claim = (self.leases[push.worker], max(step - push.staleness, 0), key)
        urls = [self.chance.choice(self.urls) for _ in bodies]
        return lambda shard: persistently(lambda: self.api.push_part(shard, *claim, bodies[shard], urls[shard], **more))

    def receive(self, answers: list[httpx.Response]) -> None:
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
        (receipt,) = {json.dumps({**answer.json(), "replayed": False}, sort_keys=True) for answer in answers}
        self.receipts.append(receipt)

    def at_once(self, played: Round) -> Round:
        """Plays a round with all its pushes under way before one is decided; returns it in the order of decisions.

        A push that is too stale for its body to be read is decided before the others.
        """
        step, count = self.begin(played), len(self.api.shards)
        begun, decided = [], []
        for push in played.pushes:
            key, last = uuid.uuid4().hex, push.last % count
            send = self.sender(push, step, key)
            early = [shard for shard in range(count) if shard != last]
            self.chance.shuffle(early)
            waiting = [under_way(partial(send, shard)) for shard in early]

            def settled(key: str = key, waiting: list[Future[httpx.Response]] = waiting) -> bool:
                return len(staged(self.redis, self.api, key)) == count - 1 or all(each.done() for each in waiting)

            wait_until(settled)
            if not self.redis.hexists(self.api.redis_key("pending"), key):
                self.receive([send(last), *(each.result() for each in waiting)])
                decided.append(push)
            else:
                begun.append((push, partial(send, last), waiting))
        changed_after = len(decided)
        self.change(played)
        for push, send_last, waiting in begun:
            self.receive([send_last(), *(each.result() for each in waiting)])
            decided.append(push)
        return replace(played, pushes=decided, changed_after=changed_after)

    def in_turn(self, played: Round) -> None:
        """Plays a round one push after another."""
        step = self.begin(played)
        for number, push in enumerate([*played.pushes, None]):
            if number == played.changed_after:
                self.change(played)
            if push is None:
                return
            send = self.sender(push, step, uuid.uuid4().hex)
            self.receive(at_once(*(partial(send, shard) for shard in range(len(self.api.shards)))))


def compare(nodes: list[ThreadService], spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
    """Plays rounds on a run of several shards, and then in the order of their decisions on a run of one."""
    ended = []
    with nodes[0].redis() as redis:
        for count in (shards, 1):
            with sharded(nodes, count % len(nodes)) as api:
                api.create(shards=count, tensors=randoms(spec, 7), **spec)
                player = Player(api, nodes, redis, spec)
                if count > 1:
                    todo = [player.at_once(played) for played in todo]
                    assert leftovers(redis, api) == NONE_LEFT
                else:
                    for played in todo:
                        player.in_turn(played)
                points = {point: wholly(api, point, [node]) for point, node in zip("xyz", nodes, strict=True)}
                ended.append((player.receipts, api.status()["pushes"], points))
    assert ended[0] == ended[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_runs_of_several_shards_are_as_runs_of_one(nodes: list[ThreadService], policy: str) -> None:
    @STEADY
    @given(
        spec=st.sampled_from(sorted(HYPERPARAMETERS)).flatmap(
            lambda algorithm: run_specs(algorithm, policy, most_pushes=WORKERS)
        ),
        shards=st.integers(2, 5),
        todo=rounds,
    )
    def compared(spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
        compare(nodes, spec, shards, todo)

    compared()
