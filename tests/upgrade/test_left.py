"""Services of this version open what the last released one left on disk and in Redis, to the step and to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from redis import Redis

import data_calls
from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from harness import store as started
from meanwhile import wait_until
from plain_calls import BODY, Api
from upgrade.conftest import Left
from upgrade.redis_commands import load


def goes_on(api: Api, told: Mapping[str, Any]) -> None:
    """The run is where its clients know it to be, knows the last push again, and takes another."""
    status = api.status()
    assert {name: status[name] for name in told["status"]} == told["status"]
    assert_points(api, told)
    again = api.http.post(api.path("/gradients"), content=BODY, headers=told["last"])
    assert (again.status_code, again.json()["replayed"], again.json()["step"]) == (200, True, status["step"])
    step = status["step"]
    assert api.push(api.lease("new"), step).json()["step"] == step + 1


def assert_points(api: Api, told: Mapping[str, Any]) -> None:
    for point, expected in told["points"].items():
        tensors, step = api.pull(point)
        assert step == told["status"]["step"]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, torch.tensor(expected[name]).reshape(tensor.shape)), (point, name)


def test_a_run_that_was_left_in_order(
    left: Left, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(left / "stopped")
    api, told = connect(service.url, "orderly"), left.told["stopped"]
    assert api.http.get("/readyz").json()["problems"] == {}
    milestones = api.http.get(api.path("/history")).json()["milestones"]
    assert {"checkpoint", "data", "lease", "control"} <= {each["event"]["kind"] for each in milestones}
    assert api.http.get(api.path()).json()["spec"]["optimizer"]["lr"] == 0.1
    assert api.status()["control"]["optimizer"]["lr"] == 0.05
    assert data_calls.show(api)["done"] == 1
    goes_on(api, told["orderly"])
    assert {step["step"] for step in api.http.get(api.path("/checkpoints")).json()["checkpoints"]} == {0, 3, 5}
    again = connect(service.url, "gone")
    again.create()
    assert again.status()["epoch"] == 2
    found = {
        name: httpx.get(f"{service.url}/v1/runs", headers={"Authorization": f"Bearer {told[name]}"}).status_code
        for name in ("token", "revoked")
    }
    assert found == {"token": 200, "revoked": 401}


def test_a_journal_that_goes_on_behind_its_checkpoint(
    left: Left, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    goes_on(connect(start_service(left / "killed").url, "journaled"), left.told["killed"]["journaled"])


@pytest.mark.parametrize("is_redis_there", [True, False], ids=["", "redis is new"])
def test_shards_whose_services_were_killed(
    left: Left,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    tmp_path: Path,
    is_redis_there: bool,
) -> None:
    shared = left / "shared"
    with started("valkey", tmp_path) as url:
        if is_redis_there:
            with Redis.from_url(url) as redis:
                load(redis, shared / "redis.jsonl")
        common = {"redis_url": url, "checkpoint_url": str(shared / "checkpoints"), "owner_ttl_seconds": 2.0}
        services = [start_service(shared / f"data-{number}", **common) for number in range(2)]
        api = connect(services[0].url, "spread")

        def owners() -> set[str | None]:
            return {shard["url"] for shard in api.http.get(api.path("/topology")).json()["shards"]}

        wait_until(lambda: owners() == {service.url for service in services})
        wait_until(lambda: api.http.get(api.path("/parameters")).status_code == 200)
        goes_on(api, left.told["shared"]["spread"])
        ThreadService.stop_all(services)


def test_an_exported_state(left: Left, service: ThreadService, connect: Callable[..., Api]) -> None:
    api, told = connect(service.url), left.told["stopped"]["orderly"]
    body = (left / "state.safetensors").read_bytes()
    made = api.http.put(api.path("/state"), content=body, headers={"Content-Type": MEDIA_TYPE})
    assert made.status_code in (200, 201), made.text
    assert_points(api, told)
    assert api.status()["control"]["optimizer"] == told["status"]["control"]["optimizer"]
