"""Whatever is pushed, a run of several shards decides and holds what a run of one shard does, to the last bit."""

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

from forms import own
from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import ShardedApi, persistently
from shards.runs import NONE_LEFT, leftovers, sharded, staged, wholly

STEADY = settings(derandomize=True, deadline=None)


@dataclass(frozen=True)
class Push:
    """A push of a round: whose, how stale, and the part of it that comes last."""

    worker: int
    staleness: int
    narrow: bool
    samples: str | None
    last: int
    seed: int


@dataclass(frozen=True)
class Round:
    """Pushes that are on their way at once, committed in their order; before them a worker may leave or come anew."""

    pushes: list[Push]
    leaver: int | None


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
    ),
    min_size=2,
    max_size=6,
)
small_shapes = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 9)),
    st.tuples(st.just(1), st.integers(200, 900)),
)
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "sgd_schedule_free": {"lr": 0.3, "weight_decay": 0.01, "warmup_steps": 3, "r": 1.0},
    "adamw_schedule_free": {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 2},
    "radam_schedule_free": {"lr": 0.05, "weight_decay": 0.1},
    "schedule_free_wrapper": {
        "base": {"algorithm": "nadam", "lr": 0.05, "weight_decay": 0.1},
        "weight_decay_at_y": 0.1,
        "averaging_constant": 20.0,
    },
    "gpa_adamw": {"lr": 0.05, "schedule": {"name": "linear", "total_steps": 5}},
    "gpa_sgd": {"lr": 0.5},
    "sgd": {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": {"name": "cosine", "total_steps": 6},
        "averaging": {"name": "polyak", "start_step": 1},
    },
    "adamw": {"lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 2}},
    "diloco": {"momentum_period": 2, "momentum_activation": 0.3},
}
RARE = ("schedule_free_wrapper", "gpa_adamw", "gpa_sgd", "diloco")
"""Algorithms that are tried under two policies only."""
POLICIES: dict[str, dict[str, Any]] = {
    "async": {},
    "ringmaster": {"max_staleness": 2},
    "sync": {},
    "quorum": {"batch": 2},
    "buffered": {"batch": 3},
    "rennala": {"batch": 2},
}


@st.composite
def specs(draw: st.DrawFn, algorithm: str, policy: str) -> dict[str, Any]:
    shapes_ = draw(st.lists(small_shapes, min_size=1, max_size=5))
    optimizer = {"algorithm": algorithm, **HYPERPARAMETERS[algorithm]}
    if draw(st.booleans()):
        optimizer["max_grad_norm"] = draw(st.sampled_from([0.5, 5.0]))
    if "schedule_free" in algorithm:
        optimizer["delay_correction"] = {"name": draw(st.sampled_from(["none", "auto"]))}
    damping = draw(st.sampled_from(["none", "delay_adaptive", "inverse_sqrt", "fadas"]))
    threshold = {"staleness_threshold": 1} if damping == "fadas" else {}
    return {
        "optimizer": optimizer,
        "aggregation": {"policy": policy, "staleness_damping": damping, **threshold, **POLICIES[policy]},
        "parameters": [
            {"name": f"t{number}", "shape": list(shape), "group": draw(st.sampled_from(["default", "own"]))}
            for number, shape in enumerate(shapes_)
        ],
        "groups": {"own": own(algorithm, lr=0.02, weight_decay=0.0)},
        "durability": "none",
    }


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

    def lease(self, number: int) -> dict[str, Any]:
        return self.api.lease(f"worker-{number}", ttl_ms=600_000)

    def begin(self, played: Round) -> int:
        """Has a worker leave and come again; the run's step then."""
        if played.leaver is not None:
            lease = self.leases[played.leaver]
            assert self.api.http.delete(self.api.path(f"/leases/{lease['lease']}")).status_code == 204
            self.leases[played.leaver] = self.lease(played.leaver)
        return int(self.redis.hget(self.api.redis_key("run"), "step") or 0)

    def sender(self, push: Push, step: int, key: str) -> Callable[[int], httpx.Response]:
        """What sends a part of a push: to its owner, or through another."""
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
        """Plays a round with all its pushes under way before one is decided; the round as it was decided.

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
        for push, send_last, waiting in begun:
            self.receive([send_last(), *(each.result() for each in waiting)])
            decided.append(push)
        return replace(played, pushes=decided)

    def in_turn(self, played: Round) -> None:
        """Plays a round one push after another."""
        step = self.begin(played)
        for push in played.pushes:
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
                points = {point: wholly(api, point, nodes) for point in "xyz"}
                ended.append((player.receipts, api.status()["pushes"], points))
    assert ended[0] == ended[1]


PAIRS = [
    (algorithm, policy)
    for algorithm in HYPERPARAMETERS
    for policy in (["async", "buffered"] if algorithm in RARE else POLICIES)
]


@pytest.mark.parametrize(("algorithm", "policy"), PAIRS)
def test_shards_are_as_one(nodes: list[ThreadService], algorithm: str, policy: str) -> None:
    @settings(STEADY, max_examples=2, suppress_health_check=list(HealthCheck))
    @given(spec=specs(algorithm, policy), shards=st.integers(2, 5), todo=rounds)
    def compared(spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
        compare(nodes, spec, shards, todo)

    compared()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_shards_are_as_one_at_length(nodes: list[ThreadService], policy: str) -> None:
    @settings(STEADY, max_examples=12, suppress_health_check=list(HealthCheck))
    @given(
        spec=st.sampled_from(sorted(HYPERPARAMETERS)).flatmap(lambda algorithm: specs(algorithm, policy)),
        shards=st.integers(2, 5),
        todo=rounds,
    )
    def compared(spec: dict[str, Any], shards: int, todo: list[Round]) -> None:
        compare(nodes, spec, shards, todo)

    compared()
