"""Runs that are changed, paused and resumed while they train, over plain HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from control_calls import change, end_worker, events_of, patch
from harness import ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, SGD, TENSORS, Api, slug
from raw_pushes import answered, begun_push, is_pending
from states import changed, document_of, export, import_, points, train

ONES = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
NOTHING = {"optimizer": {}, "groups": {}, "aggregation": {}, "paused": False, "suspended": {}}


def w(api: Api) -> float:
    return float(api.pull("y")[0]["w"][0, 0])


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
        ({"algorithm": "adamw_schedule_free"}, {"optimizer": {"betas": [0.9]}}, "optimizer.betas.1"),
        (
            {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "sgd"}},
            {"optimizer": {"base": {"algorithm": "adam"}}},
            "optimizer.base",
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


@pytest.mark.parametrize(
    "body",
    ["[]", '{"lr": 1.0}', '{"paused": 1}', '{"optimizer": null}', '{"durability": "journal"}', '{"shards": 2}', "{"],
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


def test_a_paused_run_takes_no_pushes_and_all_else_goes_on(api: Api, service: ThreadService) -> None:
    api.create(optimizer=SGD)
    lease = api.lease()
    assert api.push(lease, 0, "kept", tensors=ONES).json()["step"] == 1
    assert change(api, paused=True)["control"]["paused"] is True
    before = api.state(service)
    refusal = api.push(lease, 1, "new", tensors=ONES)
    assert (refusal.status_code, slug(refusal), refusal.headers["Retry-After"]) == (503, "run-paused", "5")
    assert api.state(service) == before
    # A receipt is a receipt, and a lease is renewed.
    assert api.push(lease, 0, "kept", tensors=ONES).json()["replayed"] is True
    assert api.http.put(api.path(f"/leases/{lease['lease']}")).status_code == 200
    assert api.lease("another")["step"] == 1
    assert api.pull("x")[1] == 1
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.http.post(api.path("/metrics"), json={"name": "loss", "value": 1.0, "step": 1}).status_code == 200
    assert api.http.put(api.path("/data/train"), json={"length": 4, "unit": 1}).status_code == 201
    held = {"Freestep-Lease": lease["lease"], "Freestep-Token": str(lease["token"])}
    claimed = api.http.post(api.path("/data/train/units"), json={"count": 1}, headers=held)
    assert [unit["unit"] for unit in claimed.json()["units"]] == [0]
    # The rate of a run that is paused may be changed.
    assert change(api, optimizer={"lr": 2.0})["control"]["paused"] is True
    assert change(api, paused=False)["control"]["paused"] is False
    assert api.push(lease, 1, "new", tensors=ONES).json()["step"] == 2
    assert w(api) == 1.0 - 1.0 - 2.0
    changes = [event["changes"] for event in events_of(api, "control")]
    assert changes == [{"paused": True}, {"optimizer": {"lr": 2.0}}, {"paused": False}]


def test_a_push_that_was_admitted_before_the_pause_waits_with_its_sender(api: Api, service: ThreadService) -> None:
    api.create(optimizer=SGD)
    lease = api.lease()
    middle = len(BODY) // 2
    with begun_push(api, lease, BODY[:middle], "slow") as connection:
        wait_until(lambda: is_pending(service, api, "slow"))
        change(api, paused=True)
        connection.sendall(BODY[middle:])
        assert b"urn:freestep:problem:run-paused" in answered(connection)
    assert api.status()["step"] == 0
    change(api, paused=False)
    assert api.push(lease, 0, "slow").json() == {
        "decision": "applied",
        "step": 1,
        "staleness": 0,
        "replayed": False,
    }


def test_no_update_is_made_while_the_run_is_paused(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one = api.lease("one")
    api.lease("two", ttl_ms=300)
    assert api.push(one, 0, tensors=ONES).json()["decision"] == "accumulated"
    change(api, paused=True)
    wait_until(lambda: [worker["worker"] for worker in api.status()["workers"]] == ["one"])
    wait_until(lambda: any(event["change"] == "expired" for event in events_of(api, "lease")))
    assert api.status()["step"] == 0
    # What it waited for has gone: the update is made as soon as the run is resumed.
    assert change(api, paused=False)["step"] == 1
    assert w(api) == 0.0


def test_a_lease_is_ended_by_an_operator(api: Api) -> None:
    api.create(optimizer=SGD)
    lease = api.lease("bad/worker ?\n")
    assert end_worker(api, "bad/worker ?\n").json() == {
        "worker": "bad/worker ?\n", "ended": True, "suspended_ms": None,
    }  # fmt: skip
    assert slug(api.push(lease, 0)) == "lease-expired"
    assert api.status()["workers"] == []
    assert events_of(api, "lease")[-1] == {"step": 0, "change": "ended", "worker": "bad/worker ?\n"}
    assert end_worker(api, "bad/worker ?\n").json()["ended"] is False
    assert api.push(api.lease("bad/worker ?\n"), 0).json()["step"] == 1


def test_a_worker_is_refused_leases_for_a_time(api: Api) -> None:
    api.create(optimizer=SGD)
    lease, other = api.lease("bad"), api.lease("good")
    assert end_worker(api, "bad", ban=3600).json() == {"worker": "bad", "ended": True, "suspended_ms": 3_600_000}
    refusal = api.http.post(api.path("/leases"), json={"worker": "bad"})
    assert (refusal.status_code, slug(refusal)) == (403, "worker-suspended")
    assert 3500 < int(refusal.headers["Retry-After"]) <= 3600
    assert slug(api.push(lease, 0)) == "lease-expired"
    assert api.push(other, 0).json()["step"] == 1
    (left,) = api.status()["control"]["suspended"].values()
    assert 3_500_000 < left <= 3_600_000
    assert events_of(api, "control") == [{"step": 0, "by": "admin-token", "changes": {"worker": "bad", "ban": 3600}}]
    assert end_worker(api, "bad", ban=0).json() == {"worker": "bad", "ended": False, "suspended_ms": 0}
    assert api.status()["control"]["suspended"] == {}
    assert api.lease("bad")["step"] == 1


def test_a_refusal_ends_by_itself(api: Api) -> None:
    api.create()
    assert end_worker(api, ban=1).json()["ended"] is False
    wait_until(lambda: api.http.post(api.path("/leases"), json={"worker": "worker"}).status_code == 201)


@pytest.mark.parametrize("ban", ["-1", "1.5", "", "x", "99999999999"])
def test_what_is_no_time_is_refused(api: Api, ban: str) -> None:
    api.create()
    api.lease()
    assert slug(end_worker(api, ban=ban)) == "malformed-request"
    assert len(api.status()["workers"]) == 1


def test_an_update_that_waits_for_a_worker_alone_is_made_when_its_lease_is_ended(api: Api) -> None:
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one = api.lease("one")
    api.lease("two")
    api.push(one, 0, tensors=ONES)
    assert end_worker(api, "two", ban=60).json()["ended"] is True
    assert api.status()["step"] == 1
    assert w(api) == 0.0


# What outlives what


def steered(api: Api, **spec: Any) -> None:
    """A run that has been changed between its steps: the rate, and before that the policy."""
    api.create(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1}, **spec)
    train(api, 0, 2)
    change(api, optimizer={"lr": 0.025, "betas": [0.8, 0.99], "weight_decay": 0.1})
    train(api, 2, 3)
    change(api, aggregation={"staleness_damping": "inverse_sqrt"})
    end_worker(api, "bad", ban=3600)


def assert_steered(api: Api) -> None:
    control = api.status()["control"]
    assert control["optimizer"] == {"lr": 0.025, "betas": [0.8, 0.99], "weight_decay": 0.1}
    assert control["aggregation"] == {"staleness_damping": "inverse_sqrt"}
    assert list(control["suspended"]) == ["bad"]
    assert api.http.post(api.path("/leases"), json={"worker": "bad"}).status_code == 403


def undisturbed(connect: Callable[..., Api], url: str) -> list[bytes]:
    """The points of a run that the same has happened to, and nothing else, at step 5."""
    api = connect(url)
    steered(api)
    train(api, 3, 5)
    return points(api)


def test_a_restored_checkpoint_has_what_was_changed_before_it(api: Api, connect: Callable[..., Api]) -> None:
    steered(api)
    assert api.http.post(api.path("/checkpoints")).json()["step"] == 3
    train(api, 3, 4)
    change(api, optimizer={"lr": 5.0, "betas": [0.9, 0.9]}, paused=True)
    assert api.http.post(api.path("/checkpoints/3/restore")).is_success
    # The run goes on as from there; how it is operated is as it was told last.
    assert api.status()["control"]["paused"] is True
    assert slug(api.push(api.lease(), 3)) == "run-paused"
    change(api, paused=False)
    assert_steered(api)
    train(api, 3, 5)
    assert points(api) == undisturbed(connect, api.url)


def test_changes_of_one_step_take_the_place_of_one_checkpoint(api: Api) -> None:
    """Else a few changes would leave nothing to go back to."""
    api.create()
    train(api, 0, 1)
    api.http.post(api.path("/checkpoints"))
    train(api, 1, 2)
    for lr in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        change(api, optimizer={"lr": lr})
    kept = [each["step"] for each in api.http.get(api.path("/checkpoints")).json()["checkpoints"]]
    assert kept == [0, 1, 2]


@pytest.mark.parametrize("durability", ["none", "checkpoint", "journal"])
def test_a_store_that_lost_its_data_is_told_again(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, durability: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    steered(api, durability=durability)
    change(api, paused=True)
    with service.redis() as redis:
        redis.flushall()
    # Until the run is open again, all are refused.
    wait_until(lambda: slug(api.http.post(api.path("/leases"), json={"worker": "bad"})) == "worker-suspended")
    assert_steered(api)
    wait_until(lambda: slug(api.push(api.lease(), 3)) == "run-paused")
    change(api, paused=False)
    train(api, 3, 5)
    assert points(api) == undisturbed(connect, api.url)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_what_was_changed_outlives_a_kill(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], durability: str
) -> None:
    service = start_process()
    api = connect(service.url)
    steered(api, durability=durability)
    change(api, paused=True)
    service.kill()
    service.start()
    assert_steered(api)
    assert (api.status()["step"], api.status()["control"]["paused"]) == (3, True)
    assert len(events_of(api, "control")) == (4 if durability == "journal" else 0)
    change(api, paused=False)
    train(api, 3, 5)
    assert points(api) == undisturbed(connect, api.url)


def test_an_orderly_restart_keeps_it(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> None:
    service = start_service()
    api = connect(service.url)
    steered(api)
    service.stop()
    again = connect(start_service().url, api.run)
    assert_steered(again)
    assert again.status()["epoch"] == 1
    train(again, 3, 5)
    assert points(again) == undisturbed(connect, again.url)


def test_a_state_takes_with_it_what_was_changed(api: Api, connect: Callable[..., Api]) -> None:
    steered(api)
    body = export(api)
    assert document_of(body)["control"]["optimizer"]["lr"] == 0.025
    assert document_of(body)["control"]["suspended"] == {}
    other = connect(api.url)
    assert import_(other, body).status_code == 201
    assert other.status()["control"]["optimizer"] == api.status()["control"]["optimizer"]
    assert other.status()["control"]["suspended"] == {}
    for each in (api, other):
        train(each, 3, 5)
    assert points(other) == points(api)


def test_a_state_with_a_change_that_there_cannot_be_is_refused(api: Api, connect: Callable[..., Api]) -> None:
    steered(api)
    for control in ({"optimizer": {"algorithm": "sgd"}}, {"optimizer": {"lr": -1.0}}, {"groups": {"x": {}}}):
        body = changed(export(api), lambda document, control=control: document.update(control=control))  # type: ignore[misc]
        other = connect(api.url)
        assert slug(import_(other, body)) == "malformed-tensors"
        assert other.http.get(other.path()).status_code == 404


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


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_a_store_that_forgot_a_pause_is_told_again(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, durability: str
) -> None:
    """As one that lost the newest of its data in a crash of its own."""
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    steered(api, durability=durability)
    with service.redis(decode_responses=False) as redis:
        older = {key: redis.dump(key) for key in redis.keys()}
        change(api, optimizer={"lr": 0.5}, paused=True)
        with redis.pipeline(transaction=True) as stroke:
            stroke.flushall()
            for key, value in older.items():
                stroke.restore(key, 60_000 if b"lease:" in key else 0, value)
            stroke.execute()
    wait_until(lambda: api.status()["control"]["paused"])
    assert api.status()["control"]["optimizer"]["lr"] == 0.5
    assert slug(api.push(api.lease(), 3)) == "run-paused"


def test_a_state_that_takes_the_place_of_another_leaves_the_pause(api: Api) -> None:
    steered(api)
    body = export(api)
    change(api, optimizer={"lr": 3.0}, paused=True)
    assert import_(api, body, replace="true").status_code == 200
    assert (api.status()["control"]["paused"], api.status()["control"]["optimizer"]["lr"]) == (True, 0.025)
    change(api, paused=False)
    assert_steered(api)


def test_a_deep_document_is_refused(api: Api) -> None:
    api.create()
    for deep in ("[" * 20_000 + "]" * 20_000, '{"a":' * 9_000 + "1" + "}" * 9_000):
        body = f'{{"optimizer": {{"lr": {deep}}}}}'
        answer = api.http.patch(api.path(), content=body, headers={"Content-Type": "application/json"})
        assert slug(answer) in ("malformed-request", "invalid-spec")
