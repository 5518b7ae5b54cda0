"""Plain HTTP calls that change a run while it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from plain_calls import Api

__all__ = ["change", "end_worker", "events_of", "patch"]


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
