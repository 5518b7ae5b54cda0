"""Metrics that evaluators report, over plain HTTP; and the plateau schedules that hear of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from freestep.api.models import AggregationSpec
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import LogPosition, Owner
from freestep_service.domain.reports import Measured
from harness import ProcessService, ThreadService
from plain_calls import TENSORS, Api, slug

PLATEAU = {"name": "plateau", "metric": "loss", "patience": 1, "factor": 0.5, "cooldown": 1, "threshold": 0.0}
ONES = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}


def report(api: Api, value: Any, step: Any, name: Any = "loss", **more: Any) -> httpx.Response:
    return api.http.post(api.path("/metrics"), json={"name": name, "value": value, "step": step, **more})


def stepped(api: Api, steps: int, **spec: Any) -> None:
    """A run that has taken some steps."""
    api.create(**spec)
    lease = api.lease()
    for step in range(steps):
        api.push(lease, step)


def test_a_report_counts_once(api: Api, service: ThreadService) -> None:
    stepped(api, 2)
    assert report(api, 0.25, 1).json() == {"name": "loss", "value": 0.25, "step": 1, "epoch": 1, "replayed": False}
    before = api.state(service)
    assert report(api, 0.25, 1).json() == {"name": "loss", "value": 0.25, "step": 1, "epoch": 1, "replayed": True}
    assert report(api, 0.25, 1, epoch=1).json()["replayed"] is True
    assert slug(report(api, 0.250000000000001, 1)) == "idempotency-conflict"
    assert api.state(service) == before


def test_the_status_and_prometheus_show_the_newest(api: Api) -> None:
    stepped(api, 2)
    for name, value, step in (("loss", 1, 0), ("loss", -0.1, 2), ("loss", 3.5, 1), ("accuracy", 0.5, 1)):
        assert report(api, value, step, name).status_code == 200
    assert api.status()["metrics"] == {"accuracy": {"value": 0.5, "step": 1}, "loss": {"value": -0.1, "step": 2}}
    shown = api.http.get("/metrics").text
    assert f'freestep_metric{{name="accuracy",run="{api.run}"}} 0.5' in shown
    assert f'freestep_metric{{name="loss",run="{api.run}"}} -0.1' in shown
    api.http.delete(api.path())
    assert api.run not in api.http.get("/metrics").text


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "loss", "value": NaN, "step": 0}',
        '{"name": "loss", "value": 1e999, "step": 0}',
        '{"name": "loss", "value": "1", "step": 0}',
        '{"name": "loss", "value": true, "step": 0}',
        '{"name": "", "value": 1, "step": 0}',
        '{"name": "loss", "value": 1, "step": -1}',
        '{"name": "loss", "value": 1, "step": 0.5}',
        '{"name": "loss", "value": 1, "step": 3}',
        '{"name": "loss", "value": 1}',
        '{"name": "loss", "value": 1, "step": 0, "more": 1}',
        "[]",
    ],
)
def test_what_is_no_report_is_refused(api: Api, service: ThreadService, body: str) -> None:
    stepped(api, 2)
    before = api.state(service)
    answer = api.http.post(api.path("/metrics"), content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")
    assert api.state(service) == before


def test_a_run_without_weights_has_no_x_to_measure(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    assert slug(report(api, 1, 0)) == "run-not-initialized"
    api.http.delete(api.path())
    assert slug(report(api, 1, 0)) == "run-not-found"


def test_of_a_metric_the_newest_64_steps_are_known(api: Api, service: ThreadService) -> None:
    stepped(api, 66)
    for step in range(1, 66):
        assert report(api, step, step).status_code == 200
    assert report(api, 2, 2).json()["replayed"] is True
    before = api.state(service)
    for step in (0, 1):
        assert slug(report(api, step, step)) == "malformed-request"
    assert api.state(service) == before
    assert report(api, 66, 66).json()["replayed"] is False
    assert slug(report(api, 2, 2)) == "malformed-request"


def test_a_run_has_so_many_metrics(api: Api, service: ThreadService) -> None:
    api.create()
    for number in range(64):
        assert report(api, 0, 0, f"metric-{number}").status_code == 200
    before = api.state(service)
    assert slug(report(api, 0, 0, "one more")) == "malformed-request"
    assert api.state(service) == before


def test_a_restore_forgets_what_was_reported_later(api: Api) -> None:
    stepped(api, 1)
    report(api, 1.0, 1)
    api.http.post(api.path("/checkpoints"))
    api.push(api.lease(), 1)
    report(api, 2.0, 2)
    report(api, 0.5, 1, "accuracy")
    assert api.http.post(api.path("/checkpoints/1/restore")).json()["metrics"] == {"loss": {"value": 1.0, "step": 1}}
    shown = api.http.get("/metrics").text
    assert f'freestep_metric{{name="loss",run="{api.run}"}} 1.0' in shown
    assert f'freestep_metric{{name="accuracy",run="{api.run}"}}' not in shown
    assert slug(report(api, 2.0, 2)) == "malformed-request"
    assert slug(report(api, 1.0, 1, epoch=1)) == "epoch-changed"
    assert report(api, 1.0, 1, epoch=2).json()["replayed"] is True
    assert report(api, 0.75, 1, "accuracy").json()["replayed"] is False


def test_reports_outlive_an_orderly_restart_and_redis(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url)
    stepped(api, 1)
    report(api, 0.1, 1)
    service.stop()
    service = start_service()
    api = connect(service.url, api.run)
    assert report(api, 0.1, 1).json() == {"name": "loss", "value": 0.1, "step": 1, "epoch": 1, "replayed": True}
    report(api, 0.2, 0)
    with service.redis() as redis:
        redis.flushall()
    assert slug(report(api, 0.3, 0)) == "idempotency-conflict"
    assert api.status()["metrics"] == {"loss": {"value": 0.1, "step": 1}}


def test_a_report_of_which_only_the_log_tells_comes_before_the_next_push(api: Api, service: ThreadService) -> None:
    """As one does whose answer from Redis was lost."""
    plateau = {**PLATEAU, "patience": 0}
    api.create(optimizer={"algorithm": "sgd", "lr": 1.0, "schedule": plateau})
    report(api, 1.0, 0)

    async def unheard() -> None:
        store = await Store.connect(f"unix://{service.settings.data_dir.resolve()}/valkey/valkey.sock")
        coordinator = Coordinator(store, api.run, "", Policy.of(AggregationSpec()))
        token = service.redis_dump(api.redis_key("shards"))[api.redis_key("shards")]["0:token"]
        for step, value in enumerate((1.0, 2.0)):
            await coordinator.log.report_metric(Owner(0, token, LogPosition(1, 0)), Measured("loss", step, value), None)
        await store.close()

    api.push(api.lease(), 0, tensors=ONES)
    asyncio.run(unheard())
    assert api.push(api.lease(), 1, tensors=ONES).json()["step"] == 2
    assert torch.equal(api.pull("y")[0]["w"], TENSORS["w"] - 1.5)
    assert report(api, 2.0, 1).json()["replayed"] is True


@pytest.mark.slow
def test_after_a_kill_the_reports_are_those_of_the_checkpoint(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    stepped(api, 1, optimizer={"algorithm": "sgd", "lr": 1.0, "schedule": PLATEAU})
    report(api, 1.0, 0)
    api.http.post(api.path("/checkpoints"))
    report(api, 2.0, 1)
    service.kill()
    service.start()
    status = api.status()
    assert (status["epoch"], status["metrics"]) == (2, {"loss": {"value": 1.0, "step": 0}})
    assert report(api, 2.0, 1).json()["replayed"] is False


def test_a_plateau_is_torchs_through_the_service(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    """With a restart, and with other numbers of shards on the way: whole numbers times powers of 1/2 are exact."""
    service = start_service()
    api = connect(service.url)
    api.create(optimizer={"algorithm": "sgd", "lr": 1.0, "schedule": PLATEAU})
    weights = {name: nn.Parameter(tensor.clone()) for name, tensor in TENSORS.items()}
    peer = torch.optim.SGD(weights.values(), lr=1.0)
    theirs = ReduceLROnPlateau(peer, patience=1, factor=0.5, cooldown=1, threshold=0.0)
    rates = []
    for step, value in enumerate([5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 9.0, 9.0, 9.0, 9.0]):
        if step == 4:
            service.stop()
            service = start_service()
            api = connect(service.url, api.run)
        if step in (2, 7):
            answer = api.http.post(api.path("/reshard"), json={"shards": 3 if step == 2 else 2})
            assert answer.status_code == 200, answer.text
        for _ in range(2):
            assert report(api, value, step).status_code == 200
        theirs.step(value)
        assert api.push(api.lease(), step, tensors=ONES).json()["step"] == step + 1
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        peer.step()
        rates.append(peer.param_groups[0]["lr"])
        y, _ = api.pull("y")
        assert all(torch.equal(y[name], weights[name].detach()) for name in weights), step
    assert rates[0] == 1.0 and rates[-1] < 0.5
