"""What was changed of a run outlives crashes, restarts, restores and moves, as what it was told last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from control_calls import change, end_worker, events_of
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug
from states import changed, document_of, export, import_, points, train


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


def test_a_state_that_takes_the_place_of_another_leaves_the_pause(api: Api) -> None:
    steered(api)
    body = export(api)
    change(api, optimizer={"lr": 3.0}, paused=True)
    assert import_(api, body, replace="true").status_code == 200
    assert (api.status()["control"]["paused"], api.status()["control"]["optimizer"]["lr"]) == (True, 0.025)
    change(api, paused=False)
    assert_steered(api)


def test_a_state_with_a_change_that_there_cannot_be_is_refused(api: Api, connect: Callable[..., Api]) -> None:
    steered(api)
    for control in ({"optimizer": {"algorithm": "sgd"}}, {"optimizer": {"lr": -1.0}}, {"groups": {"x": {}}}):
        body = changed(export(api), lambda document, control=control: document.update(control=control))  # type: ignore[misc]
        other = connect(api.url)
        assert slug(import_(other, body)) == "malformed-tensors"
        assert other.http.get(other.path()).status_code == 404
