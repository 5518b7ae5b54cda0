"""Plain HTTP calls to the data sets of a run: created, their units claimed, pushed and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from plain_calls import Api

__all__ = ["ask", "claim", "counted", "create", "give_back", "holder", "push", "show"]


def create(api: Api, name: str = "train", **spec: Any) -> httpx.Response:
    return api.http.put(api.path(f"/data/{name}"), json={"length": 10, "unit": 4, **spec})


def holder(lease: Mapping[str, Any]) -> dict[str, str]:
    return {"Freestep-Lease": lease["lease"], "Freestep-Token": str(lease["token"])}


def ask(api: Api, lease: Mapping[str, Any], count: int = 1, name: str = "train", **more: str) -> httpx.Response:
    headers = {**holder(lease), **{key.replace("_", "-"): value for key, value in more.items()}}
    return api.http.post(api.path(f"/data/{name}/units"), json={"count": count}, headers=headers)


def claim(api: Api, lease: Mapping[str, Any], count: int = 1, name: str = "train", **more: str) -> list[int]:
    """The numbers of units that a claim is given."""
    answer = ask(api, lease, count, name, **more)
    assert answer.status_code == 200, answer.text
    return [each["unit"] for each in answer.json()["units"]]


def give_back(api: Api, lease: Mapping[str, Any], units: Sequence[int] = (), name: str = "train") -> list[int]:
    query = {"units": ",".join(map(str, units))} if units else {}
    answer = api.http.delete(api.path(f"/data/{name}/units"), params=query, headers=holder(lease))
    assert answer.status_code == 200, answer.text
    return list(answer.json()["units"])


def show(api: Api, name: str = "train") -> dict[str, Any]:
    answer = api.http.get(api.path(f"/data/{name}"))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def push(
    api: Api, lease: Mapping[str, Any], step: int, units: str | None, key: str | None = None, **more: Any
) -> httpx.Response:
    marks = {} if units is None else {"Freestep_Units": units}
    return api.push(lease, step, key, **marks, **more)


def counted(api: Api, lease: Mapping[str, Any], step: int, units: str) -> dict[str, Any]:
    answer = push(api, lease, step, units)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())
