"""The learning rate that an update was made with: in the answers with a point that contains it, and in the status."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from fake_service import FakeService
from freestep import Client, Flat, Run
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import SGD, TENSORS, Api

WARMUP = {"algorithm": "adamw_schedule_free", "lr": 0.3, "warmup_steps": 7}
OWN = {"lr": 0.1, "warmup_steps": 3}
SHAPES = {"w": (2, 3), "v": (4,)}


def spec(**changes: Any) -> dict[str, Any]:
    """Two param groups, the first of which is listed last."""
    groups = {"w": "first", "v": "second"}
    return {
        "optimizer": WARMUP,
        "aggregation": {"policy": "async"},
        "parameters": [{"name": name, "shape": shape, "group": groups[name]} for name, shape in SHAPES.items()],
        "groups": {"second": OWN, "first": {}},
        **changes,
    }


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


def flat(run: Run) -> Flat:
    made = Flat(run.manifest)
    made.vector.fill_(1.0)
    return made


@pytest.mark.parametrize("shards", [1, 2])
def test_the_rate_of_each_update_is_the_packages(shared_nodes: Callable[..., list[ThreadService]], shards: int) -> None:
    nodes, name = shared_nodes(2), f"run-{uuid.uuid4().hex[:8]}"
    parameters = [nn.Parameter(weight) for weight in weights().values()]
    peer = schedulefree.AdamWScheduleFree(
        [{"params": parameters[:1]}, {"params": parameters[1:], **OWN}], lr=0.3, warmup_steps=7
    )
    peer.train()
    with Client(nodes[0].url) as client, Client(nodes[1].url) as other:
        run = client.run(name)
        run.create(spec(shards=shards))
        run.initialize(weights())
        into, onlooker = Flat(run.manifest), other.run(name)
        assert run.pull_into(into, "y").scheduled_lr is None
        assert run.status().scheduled_lr == {}
        with run.lease("me") as lease:
            for step in range(10):
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                peer.step()
                expected = tuple(group["scheduled_lr"] for group in peer.param_groups)
                _, pulled = run.exchange(flat(run), lease.claim(step), into)
                assert (pulled.step, pulled.scheduled_lr) == (step + 1, expected)
                # As a whole model, where there are several shards: this client does not know them yet.
                assert other.run(name).pull_into(into, "x").scheduled_lr == expected
                assert run.status().scheduled_lr == dict(zip(("first", "second"), expected, strict=True))
        # A process that owns no shard hears of it with a heartbeat of the one that does.
        wait_until(lambda: onlooker.status().scheduled_lr == run.status().scheduled_lr)
        run.delete()


def test_answers_name_it_in_a_header(api: Api) -> None:
    api.create(optimizer={"algorithm": "sgd_schedule_free", "lr": 0.3, "warmup_steps": 3})
    assert "Freestep-Scheduled-Lr" not in api.http.get(api.path("/parameters")).headers
    lease, name = api.lease(), "Freestep-Scheduled-Lr"
    for step, rate in enumerate(("0.09999999999999999", "0.19999999999999998", "0.3", "0.3")):
        assert float(rate) == 0.3 * min((step + 1) / 3, 1.0)
        answer = api.push(lease, step, Prefer="return=representation")
        assert answer.headers[name] == rate
        for headers in ({}, {"Range": "bytes=0-9"}):
            assert api.http.get(api.path("/parameters"), headers=headers).headers[name] == rate


@pytest.mark.parametrize(
    ("changes", "staleness", "expected"),
    [
        ({"optimizer": {**SGD, "schedule": {"name": "step", "step_size": 1, "gamma": 0.5}}}, 0, [1.0, 0.5, 0.25]),
        (
            {"optimizer": {**SGD, "lr": 0.5}, "aggregation": {"policy": "async", "staleness_damping": "inverse_sqrt"}},
            1,
            [0.5, 0.5 * 0.5**0.5, 0.5 * 0.5**0.5],
        ),
        ({"optimizer": {"algorithm": "diloco", "lr": 0.25}}, 0, [0.25, 0.25, 0.25]),
    ],
)
def test_it_is_the_one_that_was_used(api: Api, changes: dict[str, Any], staleness: int, expected: list[float]) -> None:
    api.create(**changes)
    lease, found = api.lease(), []
    for step in range(3):
        answer = api.push(lease, max(step - staleness, 0), Prefer="return=representation")
        found.append(float(answer.headers["Freestep-Scheduled-Lr"]))
    assert found == pytest.approx(expected, rel=1e-15)
    assert api.status()["scheduled_lr"] == {"default": found[-1]}


def test_a_gathered_push_leaves_it_as_it_was(api: Api) -> None:
    api.create(
        optimizer={"algorithm": "sgd_schedule_free", "lr": 1.0, "warmup_steps": 2},
        aggregation={"policy": "buffered", "batch": 2},
    )
    lease = api.lease()
    found = [api.push(lease, 0, Prefer="return=representation").headers for _ in range(3)]
    assert [headers.get("Freestep-Scheduled-Lr") for headers in found] == [None, "0.5", "0.5"]


def test_it_outlives_a_restart(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> None:
    service = start_service()
    api = connect(service.url)
    api.create(optimizer={"algorithm": "sgd_schedule_free", "lr": 1.0, "warmup_steps": 4})
    api.push(api.lease(), 0)
    service.stop()
    api = connect(start_service().url, api.run)
    assert api.status()["scheduled_lr"] == {"default": 0.25}
    assert api.http.get(api.path("/parameters")).headers["Freestep-Scheduled-Lr"] == "0.25"


def test_older_services_do_not_tell() -> None:
    parameters = [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()]
    service = FakeService({"optimizer": SGD, "parameters": parameters})
    service.scheduled_lr = None
    with service.client() as client:
        run = client.run("run")
        with run.lease("me") as lease:
            _, pulled = run.exchange(flat(run), lease.claim(0), Flat(service.manifest))
        assert (pulled.step, pulled.scheduled_lr) == (1, None)
        assert run.status().scheduled_lr == {}
