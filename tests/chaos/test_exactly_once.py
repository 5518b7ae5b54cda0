"""Every push counts once, whatever becomes of the connections that carry it.

The run is plain SGD with learning rate 1 and every gradient is -1, so the parameter counts the pushes applied.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch

from chaos.cuts import send_and_cut
from harness import ThreadService
from meanwhile import at_once
from plain_calls import SGD, Api
from raw_pushes import head_of_a_push

WORKERS = 6
PUSHES = 25
BODY = safetensors.torch.save({"count": -torch.ones(2000)})


def worker(api: Api, name: str, seed: int, steps: dict[str, int]) -> None:
    chance = random.Random(seed)
    lease = api.lease(name)
    for number in range(PUSHES):
        key = f"{name}-{number}"
        step = int(api.status()["step"])
        for _ in range(chance.randrange(3)):
            head = head_of_a_push(api.path("/gradients"), api.headers(lease, step, key), len(BODY))
            send_and_cut(api.url, head, BODY, chance)
        twins = at_once(*[partial(api.push, lease, step, key, body=BODY)] * 2)
        assert {answer.status_code for answer in twins} == {200}, [answer.text for answer in twins]
        (steps[key],) = {answer.json()["step"] for answer in twins}


@pytest.mark.parametrize("policy", [{"policy": "async"}, {"policy": "buffered", "batch": 5}])
def test_cut_connections_and_twins_apply_once(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], policy: dict[str, Any]
) -> None:
    service = start_service(stall_seconds=2)
    api = connect(service.url)
    spec = {
        "optimizer": SGD,
        "aggregation": policy,
        "parameters": [{"name": "count", "shape": [2000]}],
    }
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize({"count": torch.zeros(2000)}).status_code == 201
    steps: dict[str, int] = {}
    callers = [connect(service.url, api.run) for _ in range(WORKERS)]
    at_once(*(partial(worker, caller, f"worker-{number}", number, steps) for number, caller in enumerate(callers)))
    updates = WORKERS * PUSHES // int(policy.get("batch", 1))
    status = api.status()
    assert status["step"] == updates
    assert status["pushes"]["dropped"] == 0
    y, step = api.pull("y")
    assert step == updates
    assert torch.equal(y["count"], torch.full((2000,), float(updates)))
    if policy["policy"] == "async":
        assert sorted(steps.values()) == list(range(1, updates + 1))
