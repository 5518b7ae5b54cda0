"""What one shard refuses all refuse, and everything is as it was; a key that comes again is the push that it was."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from redis import Redis

from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, SGD, ShardedApi, slug
from raw_pushes import connected, head_of_a_push
from shards.runs import (
    NONE_LEFT,
    ONES,
    SHARDS,
    ZEROS,
    counting,
    goes_on,
    half_of_a_part,
    leftovers,
    parts_of,
    sharded,
    spoiled,
    staged,
    wholly,
)


def state(api: ShardedApi, nodes: list[ThreadService]) -> dict[str, Any]:
    """All that a refusal must leave as it was; but for places in the log, which pulls take too."""
    points = [wholly(api, point, nodes) for point in "xyz"]
    status = api.status()
    for worker in status["workers"]:
        del worker["expires_in_ms"]
    return {"points": points, "step": status["step"], "pushes": status["pushes"], "workers": status["workers"]}


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_in_one_part_is_refused_by_all(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, shard: int, value: float
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, shard, value)
    for _ in range(2):
        answers = run.push_parts(lease, 0, "spoiled", bodies)
        assert [slug(answer) for answer in answers] == ["non-finite-gradient"] * SHARDS
    assert state(run, nodes) == before
    goes_on(run, lease, redis)


@pytest.mark.parametrize(("spoil", "name"), [("nan", "non-finite-gradient"), ("malformed", "malformed-tensors")])
def test_parts_that_wait_are_refused_when_another_is(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, spoil: str, name: str
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, 2, float("nan")) if spoil == "nan" else [*run.bodies(ONES)[:2], run.bodies(ONES)[1]]
    waiting = [under_way(partial(run.push_part, shard, lease, 0, "spoiled", bodies[shard])) for shard in (0, 1)]
    wait_until(lambda: staged(redis, run, "spoiled") == {0, 1})
    assert slug(run.push_part(2, lease, 0, "spoiled", bodies[2])) == name
    assert [slug(each.result()) for each in waiting] == [name] * 2
    assert leftovers(redis, run) == NONE_LEFT
    assert state(run, nodes) == before
    goes_on(run, lease, redis)


def test_parts_that_come_after_the_refusal_are_refused_too(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    lease = run.lease()
    before = state(run, nodes)
    bodies = spoiled(run, 1, float("nan"))
    for shard in (1, 0, 2):
        assert slug(run.push_part(shard, lease, 0, "spoiled", bodies[shard])) == "non-finite-gradient"
    assert leftovers(redis, run) == NONE_LEFT
    assert state(run, nodes) == before
    # What was refused was not remembered: the key may come with a better body.
    answers = run.push_parts(lease, 0, "spoiled", run.bodies(ONES))
    assert [answer.json()["decision"] for answer in answers] == ["applied"] * SHARDS


def test_a_part_that_is_coming_in_hears_of_the_refusal(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis
) -> None:
    lease = run.lease()
    bodies = spoiled(run, 1, float("nan"))
    with half_of_a_part(run, 0, lease, "spoiled", bodies[0]) as (connection, rest):
        wait_until(lambda: 0 in parts_of(redis, run, "spoiled"))
        assert slug(run.push_part(1, lease, 0, "spoiled", bodies[1])) == "non-finite-gradient"
        connection.sendall(rest)
        answer = connection.makefile("rb").read()
        assert b"non-finite-gradient" in answer
    assert slug(run.push_part(2, lease, 0, "spoiled", bodies[2])) == "non-finite-gradient"
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)
    goes_on(run, lease, redis)


@pytest.mark.parametrize("limited", [False, True])
def test_a_norm_over_all_shards_that_overflows_is_refused(
    nodes: list[ThreadService], redis: Redis, limited: bool
) -> None:
    with sharded(nodes) as api:
        optimizer = {**SGD, "max_grad_norm": 1.0} if limited else SGD
        api.create(**counting(optimizer=optimizer, durability="none"), tensors=ZEROS)
        lease = api.lease()
        before = state(api, nodes)
        # Each part's norm is below 2^63, and that of all is above.
        tensors = {name: tensor.clone() for name, tensor in ZEROS.items()}
        for shard in range(SHARDS):
            first = next(each for each in api.shards[shard]["slices"] if each["begin"] < each["end"])
            tensors[first["name"]].reshape(-1)[first["begin"]] = 0.7 * 2.0**63
        answers = api.push_parts(lease, 0, "large", api.bodies(tensors))
        if limited:
            assert [answer.json()["decision"] for answer in answers] == ["applied"] * SHARDS
            return
        assert [slug(answer) for answer in answers] == ["non-finite-gradient"] * SHARDS
        assert state(api, nodes) == before
        goes_on(api, lease, redis)


def test_fields_of_requests_for_the_whole_are_checked_too(run: ShardedApi) -> None:
    cut = run.http.get(run.path("/state"), params={"cut": "\x84"})
    assert (slug(cut), cut.json()["field"]) == ("malformed-request", "cut")
    headers = {"Content-Type": MEDIA_TYPE, "Idempotency-Key": "of two words"}
    key = run.http.put(run.path("/parameters"), content=BODY, headers=headers)
    assert (slug(key), key.json()["field"]) == ("malformed-request", "Idempotency-Key")


def test_a_shard_that_is_not_there_is_said(run: ShardedApi) -> None:
    lease, body = run.lease(), run.bodies(ONES)[0]
    headers = run.headers(lease, 0, "astray")
    for of, shard, expected in ((2, 0, "shard-unavailable"), (4, 3, "shard-unavailable"), (3, 3, "malformed-request")):
        query = {"shard": shard, "of": of}
        for answer in (
            run.http.post(run.path("/gradients"), params=query, content=body, headers=headers),
            run.http.put(run.path("/parameters"), params=query, content=body, headers=headers),
            run.http.get(run.path("/parameters"), params=query),
        ):
            assert slug(answer) == expected
            if expected == "shard-unavailable":
                assert answer.headers["Retry-After"]
    for query in ({"shard": -1}, {"shard": 256}, {"shard": "first"}, {"shard": 0, "of": 0}, {"shard": 0, "of": 257}):
        assert slug(run.http.get(run.path("/parameters"), params=query)) == "malformed-request"
    assert slug(run.pull_part(0, "a ticket", "y")) == "malformed-request"
    assert slug(run.pull_part(0, "t" * 201, "y")) == "malformed-request"


# Keys that come again


@pytest.mark.parametrize(
    ("claim", "name"),
    [
        ({"Freestep-Token": "0"}, "lease-expired"),
        ({"Freestep-Lease": "nobodys"}, "lease-expired"),
        ({"Freestep-Step": "7"}, "malformed-request"),
        ({"Idempotency-Key": "first", "Freestep-Samples": "2"}, "idempotency-conflict"),
    ],
)
def test_a_whole_push_is_refused_for_its_claim_before_its_body_comes(
    nodes: list[ThreadService], run: ShardedApi, claim: dict[str, str], name: str
) -> None:
    lease = run.lease()
    run.push_parts(lease, 0, "first", run.bodies(ONES))
    before = state(run, nodes)
    for node in nodes:
        assert refused_at_once(node, run, {**run.headers(lease, 1, "key"), **claim}) == name
    assert state(run, nodes) == before


def test_a_whole_push_to_a_run_without_weights_is_refused_before_its_body_comes(nodes: list[ThreadService]) -> None:
    with sharded(nodes) as blank:
        blank.http.put(blank.path(), json=blank.spec(**counting(durability="none")))
        blank.learn()
        headers = blank.headers({"lease": "nobodys", "token": 1}, 0, "key")
        assert refused_at_once(nodes[0], blank, headers) == "run-not-initialized"


def refused_at_once(node: ThreadService, api: ShardedApi, headers: dict[str, str]) -> str:
    """The slug of what a push to the whole of a run is answered with whose body never comes."""
    with connected(node.url) as connection:
        connection.sendall(head_of_a_push(api.path("/gradients"), {**headers, "Connection": "close"}, 10**6))
        _, _, document = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return str(json.loads(document)["type"]).rpartition(":")[2]


def test_one_part_and_all_parts_may_come_again(nodes: list[ThreadService], run: ShardedApi, redis: Redis) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    first = run.push_parts(lease, 0, "again", bodies)
    before = state(run, nodes)
    for shard in range(SHARDS):
        answer = run.push_part(shard, lease, 0, "again", bodies[shard])
        assert answer.json() == {**first[shard].json(), "replayed": True}
    for answer in run.push_parts(lease, 0, "again", bodies):
        assert answer.json() == {**first[0].json(), "replayed": True}
    shown = run.push_parts(lease, 0, "again", bodies, Prefer="return=representation")
    assert {answer.headers["Freestep-Replayed"] for answer in shown} == {"true"}
    assert len({answer.headers["Freestep-Cut"] for answer in shown}) == 1
    assert state(run, nodes) == before
    wait_until(lambda: leftovers(redis, run) == NONE_LEFT)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_key_with_another_body_is_a_conflict(
    nodes: list[ThreadService], run: ShardedApi, redis: Redis, shard: int
) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    others = run.bodies({name: 2 * tensor for name, tensor in ONES.items()})
    # While the push is on its way ...
    early = [each for each in range(SHARDS) if each != shard]
    waiting = [under_way(partial(run.push_part, each, lease, 0, "key", bodies[each])) for each in early]
    wait_until(lambda: staged(redis, run, "key") == set(early))
    twins = [under_way(partial(run.push_part, each, lease, 0, "key", others[each])) for each in early]
    another = run.push_part(early[0], run.lease("another"), 0, "key", bodies[early[0]])
    assert slug(another) == "idempotency-conflict"
    assert run.push_part(shard, lease, 0, "key", bodies[shard]).json()["decision"] == "applied"
    assert [each.result().json()["decision"] for each in waiting] == ["applied"] * len(early)
    assert [slug(each.result()) for each in twins] == ["idempotency-conflict"] * len(early)
    # ... and once it is decided.
    assert slug(run.push_part(shard, lease, 0, "key", others[shard])) == "idempotency-conflict"
    assert slug(run.push_part(shard, lease, 1, "key", bodies[shard])) == "idempotency-conflict"
    assert run.status()["step"] == 1
    goes_on(run, lease, redis)
