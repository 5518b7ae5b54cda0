"""Checkpoints of runs whose shards are on several services, read while the run stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch

from harness import ThreadService
from plain_calls import Api, ShardedApi, persistently, slug
from shards.runs import ONES, SHARDS, SIZES, ZEROS, counting, sharded
from states import export, tensors_of


def pulled(api: Api, node: ThreadService, path: str = "/parameters", **query: Any) -> httpx.Response:
    headers = query.pop("headers", None)
    return api.http.get(f"{node.url}{api.path(path)}", params=query, headers=headers)


@pytest.fixture
def written(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run with a checkpoint of step 2, which has gone on to step 3; every gradient is subtracted from 0."""
    with sharded(nodes) as run:
        run.create(**counting(), tensors=ZEROS)
        lease = run.lease()
        for step in range(3):
            answers = run.push_parts(lease, step, f"push-{step}", run.bodies(ONES))
            assert [answer.status_code for answer in answers] == [200] * SHARDS
            if step == 1:
                assert persistently(lambda: run.http.post(run.path("/checkpoints"))).json()["step"] == 2
        yield run


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_any_service_gives_the_whole(nodes: list[ThreadService], written: ShardedApi, dtype: str) -> None:
    answers = [pulled(written, node, point="y", dtype=dtype, checkpoint=2) for node in nodes]
    assert len({answer.content for answer in answers}) == 1
    for answer in answers:
        assert (answer.headers["Freestep-Step"], answer.headers["ETag"]) == ("2", f'"e1-s2-y-{dtype}"')
        tensors = tensors_of(answer.content)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SIZES
        assert all(torch.equal(tensor, torch.full_like(tensor, -2.0)) for tensor in tensors.values())
        tag = answer.headers["ETag"]
    whole = answers[0].content
    part = pulled(written, nodes[0], point="y", dtype=dtype, checkpoint=2, headers={"Range": "bytes=100-300"})
    assert (part.status_code, part.content) == (206, whole[100:301])
    same = pulled(written, nodes[1], point="y", dtype=dtype, checkpoint=2, headers={"If-None-Match": tag})
    assert same.status_code == 304
    assert written.status()["step"] == 3


def test_parts_are_the_owners_and_of_one_place(nodes: list[ThreadService], written: ShardedApi) -> None:
    for node in (None, *nodes):
        url = None if node is None else node.url
        parts = [written.pull_part(shard, "word", "y", url=url, checkpoint=2) for shard in range(SHARDS)]
        assert {part.headers["Freestep-Cut"] for part in parts} == {parts[0].headers["Freestep-Cut"]}
        for shard, part in enumerate(parts):
            expected = {name: -2 * tensor for name, tensor in ONES.items()}
            assert tensors_of(part.content).keys() == tensors_of(written.part(expected, shard)).keys()
            for name, tensor in tensors_of(written.part(expected, shard)).items():
                assert torch.equal(tensors_of(part.content)[name], tensor)
    quantized = written.pull_part(1, "word", "y", checkpoint=2, dtype="I8")
    assert quantized.status_code == 200


def test_any_service_exports_it(nodes: list[ThreadService], written: ShardedApi) -> None:
    bodies = {pulled(written, node, "/state", checkpoint=2).content for node in nodes}
    (body,) = bodies
    for name, tensor in tensors_of(body).items():
        assert torch.equal(tensor, torch.full_like(tensor, -2.0 if name.endswith("::y") else 0.0)), name
    assert tensors_of(export(written)).keys() == tensors_of(body).keys()


def test_what_is_not_kept_is_refused_by_every_service(nodes: list[ThreadService], written: ShardedApi) -> None:
    for node in nodes:
        for path in ("/parameters", "/state"):
            answer = pulled(written, node, path, checkpoint=1)
            assert (slug(answer), answer.json()["step"]) == ("checkpoint-not-found", 1)
            assert slug(pulled(written, node, path, checkpoint=1, shard=1, of=SHARDS)) == "checkpoint-not-found"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_that_others_have_written_are_read(nodes: list[ThreadService], written: ShardedApi, shards: int) -> None:
    before = pulled(written, nodes[0], checkpoint=2).content
    answer = persistently(lambda: written.http.post(written.path("/reshard"), json={"shards": shards}))
    assert answer.status_code == 200, answer.text
    for node in nodes:
        answer = persistently(lambda node=node: pulled(written, node, checkpoint=2))  # type: ignore[misc]
        assert answer.content == before


def test_a_run_of_one_shard_is_read_through_a_service_that_has_no_part_of_it(
    nodes: list[ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(nodes[0].url)
    api.create()
    before = [[pulled(api, nodes[0], path).content for path in ("/parameters", "/state")]]
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.push(api.lease(), 0).json()["step"] == 1
    read = [[pulled(api, node, path, checkpoint=0).content for path in ("/parameters", "/state")] for node in nodes]
    assert read == before * len(nodes)
    assert {slug(pulled(api, node, checkpoint=1)) for node in nodes} == {"checkpoint-not-found"}
    api.http.delete(api.path())
