"""Runs that are changed while they train, over plain HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from control_calls import ONES, change, end_worker, events_of, patch, w
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import SGD, TENSORS, Api, slug
from states import train

NOTHING = {"optimizer": {}, "groups": {}, "aggregation": {}, "paused": False, "suspended": {}}


def pushed(api: Api, lease: dict[str, Any], **more: Any) -> float:
    """How far a push of ones moves y."""
    before = w(api)
    answer = api.push(lease, api.status()["step"], tensors=ONES, **more)
    assert answer.status_code == 200, answer.text
    return before - w(api)


def test_a_rate_is_changed_from_the_next_push_on(api: Api) -> None:
    api.create(optimizer=SGD)
    lease = api.lease()
    assert api.status()["control"] == NOTHING
    assert pushed(api, lease) == 1.0
    status = change(api, optimizer={"lr": 0.25})
    assert status["control"] == {**NOTHING, "optimizer": {"lr": 0.25}}
    assert status["spec"]["optimizer"]["lr"] == 1.0
    assert pushed(api, lease) == 0.25
    assert api.status()["scheduled_lr"] == {"default": 0.25}
    assert change(api, optimizer={"lr": 1.0})["control"] == NOTHING
    assert pushed(api, lease) == 1.0
    (first, second) = events_of(api, "control")
    assert first == {"step": 1, "by": "admin-token", "changes": {"optimizer": {"lr": 0.25}}}
    assert second["step"] == 2


def test_hyperparameters_of_groups_documents_and_limits(api: Api) -> None:
    parameters = [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()]
    parameters[0]["group"] = "own"
    api.create(
        optimizer={**SGD, "schedule": {"name": "step", "step_size": 1, "gamma": 0.5}},
        parameters=parameters,
        groups={"own": {"lr": 2.0}},
    )
    lease = api.lease()
    assert pushed(api, lease) == 2.0
    change(api, optimizer={"lr": 8.0, "schedule": {"gamma": 1.0}})
    assert pushed(api, lease) == 2.0
    assert change(api, groups={"own": {"lr": 0.5}})["control"] == {
        **NOTHING,
        "optimizer": {"lr": 8.0, "schedule": {"name": "step", "warmup_steps": 0, "step_size": 1, "gamma": 1.0}},
        "groups": {"own": {"lr": 0.5}},
    }
    assert pushed(api, lease) == 0.5
    change(api, optimizer={"max_grad_norm": 0.5, "schedule": {"name": "constant"}})
    norm = sum(tensor.numel() for tensor in TENSORS.values()) ** 0.5
    assert pushed(api, lease) == pytest.approx(0.25 / norm, rel=1e-5)
    change(api, optimizer={"max_grad_norm": None, "weight_decay": 0.5})
    before = w(api)
    assert pushed(api, lease) == pytest.approx(0.5 * (1 + 0.5 * before), rel=1e-6)


def test_a_change_of_the_policy_begins_with_the_policys_own_values(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "buffered", "batch": 3})
    lease, other = api.lease("one"), api.lease("two")
    assert api.push(lease, 0, tensors=ONES).json()["decision"] == "accumulated"
    status = change(api, aggregation={"policy": "async"})
    # The push that was waiting for two others makes an update of its own, with the change.
    assert (status["step"], status["control"]["aggregation"]) == (1, {"policy": "async", "batch": None})
    assert pushed(api, lease) == 1.0
    change(api, aggregation={"policy": "sync"})
    first = under_way(lambda: api.push(lease, 2, "one", tensors=ONES, Prefer="wait=60"))
    wait_until(lambda: api.status()["pushes"]["accumulated"] == 2)
    assert slug_of_drop(api, lease) == "duplicate-worker"
    assert api.push(other, 2, tensors=ONES).json()["decision"] == "applied"
    assert first.result().json()["decision"] == "applied"
    assert change(api, aggregation={"policy": "ringmaster", "max_staleness": 1})["step"] == 3
    assert api.push(lease, 0, tensors=ONES).json()["reason"] == "stale"
    change(api, aggregation={"staleness_damping": "inverse_sqrt"})
    assert pushed(api, lease) == 1.0
    before = w(api)
    api.push(lease, 3, tensors=ONES)
    assert before - w(api) == pytest.approx(2**-0.5, rel=1e-6)


def slug_of_drop(api: Api, lease: dict[str, Any]) -> str:
    return str(api.push(lease, api.status()["step"], tensors=ONES).json()["reason"])


def test_a_clip_of_norms_is_turned_on_and_off(api: Api) -> None:
    api.create(optimizer=SGD)
    lease = api.lease()
    change(api, aggregation={"robust": "clip", "clip_factor": 0.5})
    assert api.push(lease, 0, tensors=ONES).json()["reason"] == "norms-unknown"
    assert pushed(api, lease) == 0.5
    change(api, aggregation={"robust": "none", "clip_factor": None})
    assert pushed(api, lease) == 1.0


@pytest.mark.parametrize(
    ("optimizer", "wish", "field"),
    [
        (SGD, {"optimizer": {"algorithm": "adamw"}}, "optimizer.algorithm"),
        (SGD, {"optimizer": {"lr": -1.0}}, "optimizer.lr"),
        (SGD, {"optimizer": {"lr": "1"}}, "optimizer.lr"),
        (SGD, {"optimizer": {"rate": 1.0}}, "optimizer.rate"),
        (SGD, {"optimizer": {"averaging": {"name": "ema"}}}, "optimizer.averaging"),
        (SGD, {"optimizer": {"schedule": {"name": "linear"}}}, "optimizer.schedule.total_steps"),
        (SGD, {"groups": {"other": {"lr": 1.0}}}, "groups.other"),
        (SGD, {"durability": "none"}, "durability"),
        (SGD, {"shards": 2}, "shards"),
        (SGD, {"groups": {"default": {"max_grad_norm": 1.0}}}, "groups.default.max_grad_norm"),
        (SGD, {"aggregation": {"policy": "quorum"}}, "aggregation.batch"),
        (SGD, {"aggregation": {"robust": "krum", "f": 1, "batch": 7, "policy": "quorum"}}, "aggregation.policy"),
        ({"algorithm": "gpa_adamw"}, {"optimizer": {"mu_y": 0.9}}, "optimizer.mu_y"),
        (
            {"algorithm": "diloco", "momentum_period": 2},
            {"optimizer": {"momentum_period": 3}},
            "optimizer.momentum_period",
        ),
        ({"algorithm": "adamw_schedule_free"}, {"optimizer": {"inner_momentum": 0.9}}, "optimizer.inner_momentum"),
        ({"algorithm": "adamw_schedule_free"}, {"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        (
            {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "sgd"}},
            {"optimizer": {"base": {"algorithm": "adam"}}},
            "optimizer.base",
        ),
        *(
            (
                {"algorithm": "sgd_schedule_free", "delay_correction": {"name": before}},
                {"optimizer": {"delay_correction": {"name": after}}},
                "optimizer.delay_correction",
            )
            for before, after in (("ahead", "auto"), ("none", "ahead"))
        ),
    ],
)
def test_what_cannot_be_changed_is_refused_with_why(
    api: Api, service: ThreadService, optimizer: dict[str, Any], wish: dict[str, Any], field: str
) -> None:
    api.create(optimizer=optimizer)
    train(api, 0, 1)
    before = api.state(service)
    answer = patch(api, **wish)
    assert (slug(answer), answer.json()["field"]) == ("invalid-spec", field)
    assert api.state(service) == before


def test_what_belongs_to_a_run_for_good_is_named(api: Api) -> None:
    api.create(optimizer=SGD)
    assert patch(api, durability="none").json()["detail"] == "durability: durability is fixed when a run is created"
    assert "freestep runs reshard" in patch(api, shards=2).json()["detail"]
    assert patch(api, lr=1.0).json()["detail"] == "lr: there is no such field"


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        '{"lr": 1.0}',
        '{"paused": 1}',
        '{"optimizer": null}',
        '{"durability": "journal"}',
        '{"shards": 2}',
        "{",
        r'{"optimizer": {"lr": "\ud800"}}',
        r'{"groups": {"default": {"lr": ["\udfff"]}}}',
        r'{"aggregation": {"policy": {"\ud800": 1}}}',
    ],
)
def test_what_is_no_change_is_refused(api: Api, service: ThreadService, body: str) -> None:
    api.create()
    before = api.state(service)
    answer = api.http.patch(api.path(), content=body, headers={"Content-Type": "application/json"})
    assert slug(answer) in ("malformed-request", "invalid-spec")
    assert api.state(service) == before


def test_a_run_without_weights_cannot_be_changed(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    assert slug(patch(api, paused=True)) == "run-not-initialized"
    assert slug(end_worker(api, ban=5)) == "run-not-initialized"
    assert api.status()["control"] == NOTHING


def test_a_repetition_changes_nothing(api: Api, service: ThreadService) -> None:
    api.create(optimizer=SGD)
    assert patch(api, "one", optimizer={"lr": 0.5}).status_code == 200
    assert change(api, optimizer={"lr": 0.25})["control"]["optimizer"] == {"lr": 0.25}
    before = api.state(service)
    # As of a client whose first answer was lost: what was changed since stays.
    assert patch(api, "one", optimizer={"lr": 0.5}).json()["control"]["optimizer"] == {"lr": 0.25}
    assert change(api, optimizer={"lr": 0.25}, paused=False)["control"]["optimizer"] == {"lr": 0.25}
    assert change(api)["control"]["optimizer"] == {"lr": 0.25}
    assert slug(patch(api, "one", optimizer={"lr": 0.75})) == "idempotency-conflict"
    assert api.state(service) == before
    assert len(events_of(api, "control")) == 2


def test_a_rate_that_is_set_begins_a_plateau_anew(api: Api) -> None:
    plateau = {"name": "plateau", "metric": "loss", "patience": 0, "factor": 0.5, "threshold": 0.0}
    api.create(optimizer={**SGD, "schedule": plateau})
    lease = api.lease()
    for step, value in enumerate((1.0, 2.0, 3.0)):
        pushed(api, lease)
        api.http.post(api.path("/metrics"), json={"name": "loss", "value": value, "step": step})
    assert pushed(api, lease) == 0.25
    change(api, optimizer={"lr": 4.0})
    assert pushed(api, lease) == 4.0
    api.http.post(api.path("/metrics"), json={"name": "loss", "value": 9.0, "step": 4})
    assert pushed(api, lease) == 2.0
    change(api, optimizer={"schedule": {"name": "constant"}})
    assert pushed(api, lease) == 4.0


def test_a_run_that_gathers_after_all_takes_the_memory_for_it(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url)
    api.create()
    free = service.registry._resources.memory.free
    change(api, aggregation={"policy": "buffered", "batch": 4})
    assert service.registry._resources.memory.free < free
    change(api, aggregation={"policy": "async"})
    wait_until(lambda: service.registry._resources.memory.free == free)
    service.registry._resources.memory.total -= service.registry._resources.memory.free
    refusal = patch(api, aggregation={"policy": "buffered", "batch": 4})
    assert slug(refusal) == "invalid-spec"
    assert refusal.json()["free_bytes"] < refusal.json()["needed_bytes"]
    assert api.status()["control"] == NOTHING
    assert api.push(api.lease(), 0).json()["decision"] == "applied"


def test_a_deep_document_is_refused(api: Api) -> None:
    api.create()
    for depth in (100, 245, 255, 265, 500, 9_000):
        deep = '{"a":' * depth + "[1]" + "}" * depth
        body = f'{{"optimizer": {{"lr": {deep}}}}}'
        answer = api.http.patch(api.path(), content=body, headers={"Content-Type": "application/json"})
        assert slug(answer) in ("malformed-request", "invalid-spec")
