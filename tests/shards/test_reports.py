"""Metrics of a run over several processes: all shards hear of them between the same two steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from harness import ThreadService
from meanwhile import at_once
from plain_calls import Api, ShardedApi
from shards.runs import ONES, SHARDS, SIZES, counting, sharded, wholly

ADAMW = {
    "algorithm": "adamw",
    "lr": 0.1,
    "schedule": {"name": "plateau", "metric": "loss", "patience": 0, "factor": 0.3, "threshold": 0.0},
}


def report(api: Api, node: ThreadService, value: float, step: int) -> httpx.Response:
    """Reports a loss at a node, which may own no shard, in JSON with more spaces than anybody needs."""
    content = f'{{ "name" :  "loss", "value": {value!r}, "step": {step} }}'
    headers = {"Content-Type": "application/json"}
    return api.http.post(f"{node.url}{api.path('/metrics')}", content=content, headers=headers)


def randoms(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def played(nodes: list[ThreadService], shards: int) -> list[Any]:
    """A run of some shards after pushes and reports: its points, and what its status says of metrics."""
    with sharded(nodes) as api:
        api.create(**counting(shards, optimizer=ADAMW, durability="none"), tensors=randoms(0))
        lease = api.lease()
        for step in range(9):
            answer = report(api, nodes[step % len(nodes)], float(step % 4), step)
            assert answer.status_code == 200, answer.text
            receipts = api.push_parts(lease, step, f"key-{step}", api.bodies(randoms(step)))
            assert [receipt.json()["step"] for receipt in receipts] == [step + 1] * shards
        return [*(wholly(api, point, nodes) for point in "xyz"), api.status()["metrics"]]


def test_a_plateau_is_the_same_however_a_run_is_cut(nodes: list[ThreadService]) -> None:
    whole = played(nodes, 1)
    assert whole[-1] == {"loss": {"value": 0.0, "step": 8}}
    assert played(nodes, SHARDS) == whole


@pytest.mark.parametrize("shards", [1, SHARDS])
def test_of_reports_at_once_one_counts(nodes: list[ThreadService], shards: int) -> None:
    with sharded(nodes) as api:
        api.create(**counting(shards, durability="none"), tensors=ONES)
        answers = at_once(*(partial(report, api, nodes[number % len(nodes)], 1.5, 0) for number in range(6)))
        assert sorted(answer.json()["replayed"] for answer in answers) == [False] + [True] * 5
        with_other_values = at_once(*(partial(report, api, node, 2.5, 0) for node in nodes))
        assert {answer.status_code for answer in with_other_values} == {409}


def test_reports_between_pushes_leave_no_shard_behind(run: ShardedApi, nodes: list[ThreadService]) -> None:
    lease = run.lease()
    at_once(
        *(partial(report, run, node, 1.0, 0) for node in nodes),
        *(partial(run.push_parts, lease, 0, f"key-{number}", run.bodies(ONES)) for number in range(3)),
    )
    assert run.status()["step"] == 3
    assert wholly(run, "x", nodes) == b"".join(bytes((-3 * ones).numpy()) for ones in ONES.values())
