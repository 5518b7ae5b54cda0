"""Plain HTTP calls that change a run while it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
import torch

from plain_calls import TENSORS, Api

__all__ = ["ONES", "change", "end_worker", "events_of", "patch", "w"]

ONES = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}


def w(api: Api) -> float:
    """An element of y, which a push of ones moves by the learning rate, where the algorithm is SGD."""
    return float(api.pull("y")[0]["w"][0, 0])


def patch(api: Api, key: str | None = None, **wish: Any) -> httpx.Response:
    return api.http.patch(api.path(), json=wish, headers={"Idempotency-Key": key} if key else {})


def change(api: Api, **wish: Any) -> dict[str, Any]:
    """The status after a change that is made."""
    answer = patch(api, **wish)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def end_worker(api: Api, worker: str = "worker", **query: Any) -> httpx.Response:
    return api.http.delete(api.path(f"/workers/{quote(worker, safe='')}"), params=query)


def events_of(api: Api, kind: str) -> list[Mapping[str, Any]]:
    """What the run's newest events of a kind tell beside their places."""
    answer = api.http.get(api.path("/events"), params={"follow": "false"})
    assert answer.status_code == 200, answer.text
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.split("\n\n") if block]
    told = [json.loads(block["data"]) for block in blocks if block.get("event") == kind]
    return [{name: value for name, value in each.items() if name not in ("id", "epoch", "kind")} for each in told]
