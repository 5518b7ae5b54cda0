"""The units of data sets in runs of several shards: a push counts them once, by its last part."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import safetensors.torch

from data_calls import ask, claim, create, give_back, holder, push, show
from harness import ThreadService
from plain_calls import Api, ShardedApi, slug
from shards.runs import ONES, counting, sharded, spoiled


def slugs(answers: list[httpx.Response]) -> set[str]:
    return {slug(answer) for answer in answers}


def test_all_parts_of_a_push_count_its_units_once(run: ShardedApi, nodes: list[ThreadService]) -> None:
    create(run, length=100, unit=1)
    lease, bodies = run.lease(), run.bodies(ONES)
    assert claim(run, lease, 4) == [0, 1, 2, 3]
    for _ in range(2):
        answers = run.push_parts(lease, 0, "key", bodies, Freestep_Units="train=0,2")
        assert {answer.json()["step"] for answer in answers} == {1}
    assert show(run)["done"] == 2 and show(run)["out"] == 2
    assert slugs(run.push_parts(lease, 1, "again", bodies, Freestep_Units="train=1,2")) == {"unit-not-held"}
    assert slugs(run.push_parts(lease, 1, "key", bodies, Freestep_Units="train=1")) == {"idempotency-conflict"}
    # Any process hands out units, and any takes them back.
    for node in nodes:
        other = Api(node.url, run.run)
        assert claim(other, lease) == [4]
        assert give_back(other, lease, [4]) == [4]
        assert show(other)["out"] == 2
        other.http.close()


def test_a_body_that_one_shard_refuses_opens_the_units_again(run: ShardedApi) -> None:
    create(run, length=100, unit=1)
    lease = run.lease()
    claim(run, lease, 2)
    answers = run.push_parts(lease, 0, "key", spoiled(run, 1, float("nan")), Freestep_Units="train=0")
    assert slugs(answers) == {"non-finite-gradient"}
    assert show(run)["out"] == 1
    assert claim(run, run.lease("other")) == [0]


def test_a_whole_push_has_its_units_with_all_parts(run: ShardedApi) -> None:
    create(run, length=100, unit=1)
    lease = run.lease()
    claim(run, lease, 2)
    assert slug(push(run, lease, 0, "train=2", body=b"no tensors")) == "unit-not-held"
    answer = push(run, lease, 0, "train=0", "key", body=safetensors.torch.save(ONES))
    assert answer.json()["decision"] == "applied"
    assert push(run, lease, 0, "train=0", "key", body=safetensors.torch.save(ONES)).json()["replayed"]
    assert show(run)["done"] == 1


def test_units_stay_through_another_number_of_shards(
    shared_nodes: Callable[..., list[ThreadService]], stall_seconds: float
) -> None:
    nodes = shared_nodes(3, stall_seconds=stall_seconds)
    with sharded(nodes) as run:
        run.create(**counting(shards=1), tensors={name: tensor * 0 for name, tensor in ONES.items()})
        create(run, length=100, unit=1)
        lease = run.lease()
        claim(run, lease, 4)
        push(run, lease, 0, "train=0,3", body=safetensors.torch.save(ONES))
        for shards in (3, 2):
            assert run.http.post(run.path("/reshard"), json={"shards": shards}).is_success
            status = show(run)
            assert (status["done"], status["out"], status["open"]) == (2, 0, 98)
            fresh = run.lease()
            assert claim(run, fresh, 3) == [1, 2, 4]
            assert slug(ask(run, lease)) == "lease-expired"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_process_without_a_shard_passes_claims_on(
    shared_nodes: Callable[..., list[ThreadService]], stall_seconds: float, shards: int
) -> None:
    nodes = shared_nodes(3, stall_seconds=stall_seconds)
    with sharded(nodes) as run:
        run.create(**counting(shards=shards), tensors={name: tensor * 0 for name, tensor in ONES.items()})
        for number, node in enumerate(nodes):
            other = Api(node.url, run.run)
            assert create(other, f"set-{number}", length=10).status_code == 201
            lease = other.lease()
            assert claim(other, lease, 1, f"set-{number}", Prefer="wait=30") == [0]
            assert give_back(other, lease, name=f"set-{number}") == [0]
            assert holder(lease)
            other.http.close()
        assert set(run.status()["data"]) == {"set-0", "set-1", "set-2"}
