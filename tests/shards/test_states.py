"""Whole states of runs whose shards are on several services: of one place in the log, into any number of shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from redis import Redis

from harness import ThreadService
from meanwhile import DEADLINE_S, under_way, wait_until
from plain_calls import Api, ShardedApi, persistently, slug
from shards.runs import ONES, SHARDS, SIZES, ZEROS, counting, sharded, wholly
from states import body_of, document_of, export, gradient, import_, points, tensors_of

ADAMW = {"algorithm": "adamw_schedule_free", "lr": 0.01, "weight_decay": 0.1}


@pytest.fixture
def adamw(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run of AdamW with a shard on each service."""
    with sharded(nodes) as api:
        api.create(**counting(optimizer=ADAMW), tensors=ZEROS)
        yield api


def train(api: Api, first: int, last: int) -> None:
    """Pushes whole gradients that depend on their step alone; each is of a size that shards may divide anywhere."""
    lease = api.lease("trainer")
    for step in range(first, last):
        answer = persistently(lambda step=step: api.push(lease, step, f"at-{step}", tensors=gradient(step, ONES)))  # type: ignore[misc]
        assert answer.json()["step"] == step + 1, answer.text


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_state_goes_into_any_number_of_shards(
    nodes: list[ThreadService], adamw: ShardedApi, connect: Callable[..., Api], shards: int
) -> None:
    train(adamw, 0, 3)
    there = connect(nodes[1].url)
    assert there.http.put(there.path(), json=there.spec(**counting(shards, optimizer=ADAMW))).status_code == 201
    answer = persistently(lambda: import_(there, export(adamw), headers={"Idempotency-Key": "one"}))
    assert (answer.status_code, answer.json()["shards"], answer.json()["step"]) == (201, shards, 3)
    assert points(there) == points(adamw)
    train(adamw, 3, 6)
    train(there, 3, 6)
    assert points(there) == points(adamw)
    there.http.delete(there.path())


def test_any_service_gives_and_takes_the_whole(nodes: list[ThreadService], adamw: ShardedApi) -> None:
    train(adamw, 0, 2)
    bodies = [adamw.http.get(f"{node.url}{adamw.path('/state')}").content for node in nodes]
    documents = [document_of(body) for body in bodies]
    assert all(document == documents[0] for document in documents)
    assert len({safetensors.torch.save(tensors_of(body)) for body in bodies}) == 1
    before = points(adamw)
    for number, node in enumerate(nodes):
        train(adamw, 2, 3)
        there = ShardedApi(node.url, adamw.run)
        answer = persistently(lambda there=there: import_(there, bodies[0], replace="true"))  # type: ignore[misc]
        there.http.close()
        assert (answer.status_code, answer.json()["epoch"]) == (200, number + 2), answer.text
        assert points(adamw) == before


def test_a_state_that_is_not_there_yet_becomes_a_run_of_all_services(
    nodes: list[ThreadService], adamw: ShardedApi
) -> None:
    train(adamw, 0, 2)
    with sharded(nodes, 2) as there:
        answer = persistently(lambda: import_(there, export(adamw), headers={"Idempotency-Key": "one"}))
        assert (answer.status_code, answer.json()["shards"]) == (201, SHARDS)
        there.shards = there.http.get(there.path("/topology")).json()["shards"]
        assert len({shard["url"] for shard in there.shards}) == SHARDS
        for point in "xyz":
            assert wholly(there, point, nodes) == wholly(adamw, point, nodes)


def test_a_run_of_one_shard_is_moved_through_a_service_that_has_no_part_of_it(
    nodes: list[ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(nodes[0].url)
    api.create()
    there = connect(nodes[1].url, api.run)
    state = export(there)
    assert slug(import_(there, state)) == "already-initialized"
    assert persistently(lambda: import_(there, state, replace="true")).json()["epoch"] == 2
    assert slug(import_(there, state, headers={"If-Match": '"e1-s0-y-F32"'}, replace="true")) == "epoch-changed"
    api.http.delete(api.path())


def test_an_export_is_of_one_step_while_the_run_goes_on(run: ShardedApi) -> None:
    lease, pushed = run.lease("pusher"), []

    def push() -> None:
        for step in range(40):
            answer = persistently(lambda step=step: run.push(lease, step, f"push-{step}", tensors=ONES))  # type: ignore[misc]
            pushed.append(answer.json()["step"])

    pushing = under_way(push)
    steps = set()
    while not pushing.done():
        body = persistently(lambda: run.http.get(run.path("/state"))).content
        step = document_of(body)["step"]
        steps.add(step)
        assert {float(value) for tensor in tensors_of(body).values() for value in tensor.flatten().tolist()} <= {
            -float(step),
            0.0,
        }
        y = torch.cat([tensors_of(body)[f"{name}::y"].flatten() for name in SIZES])
        assert torch.equal(y, torch.full_like(y, -float(step)))
    pushing.result()
    assert pushed == list(range(1, 41))
    assert len(steps) > 1


def test_a_part_is_exported_with_the_others_or_alone(run: ShardedApi) -> None:
    for word in ("together", ""):
        for shard in range(SHARDS):
            answer = run.http.get(run.url_of(shard, "/state"), params=run.query(shard, cut=word))
            assert answer.status_code == 200, answer.text
            names = {each["name"] for each in run.shards[shard]["slices"]}
            assert {name.partition("::")[0] for name in tensors_of(answer.content)} == names
    places = {
        run.http.get(run.url_of(shard, "/state"), params=run.query(shard, cut="again")).headers["Freestep-Cut"]
        for shard in range(SHARDS)
    }
    assert len(places) == 1


def test_who_exports_one_shard_holds_up_other_exports_only(run: ShardedApi, redis: Redis) -> None:
    def export_part(shard: int, word: str) -> httpx.Response:
        return httpx.get(
            run.url_of(shard, "/state"), params=run.query(shard, cut=word), headers=run.http.headers, timeout=DEADLINE_S
        )

    def exported() -> list[str]:
        cuts: Any = redis.hvals(run.redis_key("cuts"))
        return [cut["point"] for cut in map(json.loads, cuts) if cut["point"].startswith("state")]

    assert export_part(0, "first").status_code == 200
    # Nobody comes to the other shards for the first, so these have to wait.
    words = ["second", "third", "fourth"]
    others = {word: under_way(lambda word=word: export_part(0, word)) for word in words}  # type: ignore[misc]
    lease = run.lease()
    for step in range(4):
        answers = run.push_parts(lease, step, f"push-{step}", run.bodies(ONES))
        assert [answer.status_code for answer in answers] == [200] * SHARDS
        assert [answer.status_code for answer in run.pull_parts(f"pull-{step}")] == [200] * SHARDS
        assert exported() == ["state F32"]
    assert not any(other.done() for other in others.values())
    here = "first"
    while True:
        assert [export_part(shard, here).status_code for shard in range(1, SHARDS)] == [200] * (SHARDS - 1)
        if not others:
            break
        wait_until(lambda: any(other.done() for other in others.values()))
        (here,) = (word for word, other in others.items() if other.done())
        assert others.pop(here).result().status_code == 200
    wait_until(lambda: exported() == [])


def test_parts_are_taken_from_services_only(run: ShardedApi) -> None:
    answer = run.http.get(run.url_of(1, "/state"), params=run.query(1))
    put = run.http.put(
        run.url_of(1, "/state"),
        params=run.query(1, replace="true"),
        content=answer.content,
        headers={"Content-Type": "application/vnd.safetensors", "Freestep-Relayed": "forged"},
    )
    assert (slug(put), put.json()["field"]) == ("malformed-request", "shard")


def test_what_one_shard_refuses_changes_none(run: ShardedApi) -> None:
    lease = run.lease()
    answers = run.push_parts(lease, 0, "first", run.bodies(ONES))
    assert [answer.status_code for answer in answers] == [200] * SHARDS
    state = export(run)
    tensors = tensors_of(state)
    tensors["w::y"].view(-1)[-1] = float("nan")
    assert slug(import_(run, body_of(tensors, document_of(state)), replace="true")) == "malformed-tensors"
    assert (run.status()["epoch"], run.status()["step"]) == (1, 1)
    assert [a.status_code for a in run.push_parts(lease, 1, "second", run.bodies(ONES))] == [200] * SHARDS
