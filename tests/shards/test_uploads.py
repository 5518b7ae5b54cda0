"""Initial weights in parts: of one upload on all shards, or none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import httpx
import pytest
import safetensors.torch
import torch

from freestep.flat import DTYPES
from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from meanwhile import at_once, under_way
from plain_calls import ShardedApi, persistently, slug
from shards.runs import ONES, SHARDS, SLOTS, counting, sharded, spoiled


@pytest.fixture(scope="module")
def stall_seconds() -> float:
    return 1.0


def upload(api: ShardedApi, shard: int, body: bytes, key: str | None, url: str | None = None) -> httpx.Response:
    headers = {"Content-Type": MEDIA_TYPE, **({"Idempotency-Key": key} if key else {})}
    return api.http.put(api.url_of(shard, "/parameters", url), params=api.query(shard), content=body, headers=headers)


@pytest.fixture
def blank(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run that has no weights yet."""
    with sharded(nodes) as api:
        assert api.http.put(api.path(), json=counting(durability="none")).status_code == 201
        api.learn()
        yield api


def uploaded(api: ShardedApi, key: str, value: float, url: str | None = None) -> list[httpx.Response]:
    """Uploads weights that are all alike, all parts at once."""
    bodies = api.bodies({name: torch.full_like(tensor, value) for name, tensor in ONES.items()})
    parts = [partial(upload, api, shard, body, key, url) for shard, body in enumerate(bodies)]
    return at_once(*(partial(persistently, part) for part in parts))


def test_a_part_of_the_weights_names_its_upload(blank: ShardedApi) -> None:
    bodies = blank.bodies(ONES)
    answer = upload(blank, 0, bodies[0], None)
    assert (slug(answer), answer.json()["field"]) == ("malformed-request", "Idempotency-Key")
    assert blank.status()["initialized"] is False
    assert slug(blank.push_part(0, blank.lease(), 0, "early", bodies[0])) == "run-not-initialized"
    assert [answer.status_code for answer in uploaded(blank, "first", 1.0)] == [201] * SHARDS
    assert [slug(answer) for answer in uploaded(blank, "second", 2.0)] == ["already-initialized"] * SHARDS
    assert blank.status()["initialized"] is True
    for tensor in blank.pull("y")[0].values():
        assert torch.equal(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("by", ["an owner", "any node"])
def test_an_upload_whose_answer_was_lost_may_come_again(nodes: list[ThreadService], blank: ShardedApi, by: str) -> None:
    """Its parts, or the whole through a node; another one under its key is another."""

    def sent(value: float) -> set[int]:
        if by == "an owner":
            return {answer.status_code for answer in uploaded(blank, "first", value)}
        body = safetensors.torch.save({name: torch.full_like(tensor, value) for name, tensor in ONES.items()})
        path, headers = f"{nodes[1].url}{blank.path('/parameters')}", {"Content-Type": MEDIA_TYPE}
        return {blank.http.put(path, content=body, headers={**headers, "Idempotency-Key": "first"}).status_code}

    assert sent(1.0) == sent(1.0) == {201}
    assert sent(2.0) == {412}
    for tensor in blank.pull("y")[0].values():
        assert torch.equal(tensor, torch.ones_like(tensor))


def test_of_uploads_that_race_one_wins_on_all_shards(nodes: list[ThreadService], blank: ShardedApi) -> None:
    urls = [nodes[number % len(nodes)].url for number in range(8)]
    answers = at_once(
        *(partial(uploaded, blank, f"upload-{number}", float(number), url) for number, url in enumerate(urls))
    )
    outcomes = [{answer.status_code for answer in each} for each in answers]
    assert sorted(map(sorted, outcomes)) == [[201], *[[412]] * 7]
    winner = float(outcomes.index({201}))
    for tensor in blank.pull("y")[0].values():
        assert torch.equal(tensor, torch.full_like(tensor, winner))


def test_refused_weights_leave_the_run_without(nodes: list[ThreadService], blank: ShardedApi) -> None:
    bodies = spoiled(blank, 1, float("nan"))
    assert slug(upload(blank, 1, bodies[1], "spoiled")) == "malformed-tensors"
    assert slug(upload(blank, 0, bodies[1], "spoiled")) == "malformed-tensors"
    assert blank.status()["initialized"] is False
    assert [answer.status_code for answer in uploaded(blank, "first", 1.0)] == [201] * SHARDS


def test_uploads_that_are_left_half_do_not_hinder_others(nodes: list[ThreadService], blank: ShardedApi) -> None:
    """As many as a shard has memory for, and more: of each, only one part comes."""
    bodies = blank.bodies(ONES)
    waiting = [
        under_way(partial(upload, blank, number % SHARDS, bodies[number % SHARDS], f"left-{number}"))
        for number in range(4 * SLOTS)
    ]
    assert [answer.status_code for answer in uploaded(blank, "whole", 1.0)] == [201] * SHARDS
    assert {each.result().status_code for each in waiting} <= {412, 503}


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32")])
def test_weights_and_gradients_may_come_whole_through_any_node(
    nodes: list[ThreadService], blank: ShardedApi, dtypes: tuple[str, str]
) -> None:
    """Of one dtype, which then goes on to the shards, or of two."""
    kinds = [DTYPES[name] for name in dtypes]
    whole = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)).to(kinds[number % 2])
        for number, (name, tensor) in enumerate(ONES.items())
    }
    body, path = safetensors.torch.save(whole), f"{nodes[1].url}{blank.path('/parameters')}"
    assert blank.http.put(path, content=body, headers={"Content-Type": MEDIA_TYPE}).status_code == 201
    for turn in range(2):
        url = f"{nodes[turn].url}{blank.path('/gradients')}"
        answer = blank.http.post(url, content=body, headers=blank.headers(blank.lease(), turn, f"{turn}"))
        assert answer.json()["decision"] == "applied"
        y, step = blank.pull("y")
        assert step == turn + 1
        for name, tensor in whole.items():
            torch.testing.assert_close(y[name], -turn * tensor.float(), rtol=0, atol=1e-6)
