"""The units of data sets go where the weights go: back to a checkpoint, on after a restart, into another run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from data_calls import ask, claim, counted, create, give_back, push, show
from harness import ProcessService, ThreadService
from plain_calls import Api, persistently, slug
from rolled_back import copied, roll_back
from states import changed, document_of, export, import_


def started(api: Api, **spec: Any) -> dict[str, Any]:
    """A run with a data set of a hundred units, of which 0, 2 and 3 have counted, 1 and 4 are out and 5 was given back;
    the lease of who has them."""
    api.create(**spec)
    create(api, length=100, unit=1)
    lease = api.lease()
    assert claim(api, lease, 6) == list(range(6))
    counted(api, lease, 0, "train=0")
    counted(api, lease, 0, "train=2,3")
    assert give_back(api, lease, [5]) == [5]
    return lease


def counts(api: Api) -> tuple[int, int, int]:
    """Units that are open, out and done."""
    status = show(api)
    return status["open"], status["out"], status["done"]


def test_a_restore_takes_back_the_units_that_counted_after_it(api: Api) -> None:
    lease = started(api)
    assert api.http.post(api.path("/checkpoints")).json()["step"] == 2
    counted(api, lease, 2, "train=1,4")
    assert counts(api) == (95, 0, 5)
    assert api.http.post(api.path("/checkpoints/2/restore")).is_success
    assert counts(api) == (97, 0, 3)
    assert slug(ask(api, lease)) == "epoch-changed"
    fresh = api.lease()
    assert claim(api, fresh, 4) == [1, 4, 5, 6]
    assert counted(api, fresh, 2, "train=1,4")["step"] == 3
    assert slug(push(api, fresh, 3, "train=2")) == "unit-not-held"


def test_a_restore_to_before_a_data_set_takes_it_back(api: Api) -> None:
    api.create()
    api.push(api.lease(), 0)
    assert api.http.post(api.path("/checkpoints")).json()["step"] == 1
    create(api)
    claim(api, api.lease(), 2)
    assert api.http.post(api.path("/checkpoints/1/restore")).is_success
    assert slug(api.http.get(api.path("/data/train"))) == "data-not-found"
    assert create(api, length=5).status_code == 201
    assert claim(api, api.lease(), 2) == [0, 1]


def test_an_orderly_restart_leaves_units_with_their_leases(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    first = start_service(redis_url=redis_url)
    api = connect(first.url)
    lease = started(api)
    before = show(api)
    first.stop()
    again = connect(start_service(redis_url=redis_url).url, api.run)
    after = show(again)
    assert {**after, "holders": []} == {**before, "holders": []}
    assert [(each["worker"], each["units"]) for each in after["holders"]] == [("worker", 2)]
    assert again.status()["epoch"] == 1
    assert counted(again, lease, 2, "train=1,4")["step"] == 3
    assert claim(again, lease, 2) == [5, 6]


@pytest.mark.slow
def test_after_a_kill_units_are_those_of_the_last_checkpoint(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    lease = started(api)
    api.http.post(api.path("/checkpoints"))
    counted(api, lease, 2, "train=1")
    claim(api, lease, 30)
    service.kill()
    service.start()
    assert counts(api) == (97, 0, 3)
    fresh = api.lease()
    assert claim(api, fresh, 4) == [1, 4, 5, 6]


@pytest.mark.parametrize("loss", ["wiped", "rolled back"])
def test_a_store_that_lost_its_data_hands_out_no_unit_twice(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, loss: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    lease = started(api)
    with service.redis(decode_responses=False) as client:
        older = copied(client) if loss == "rolled back" else {}
        assert claim(api, lease, 2) == [5, 6]
        counted(api, lease, 2, "train=1,6")
        roll_back(client, older)
    # Its claims may be asked of the store before anybody has noticed.
    if loss == "wiped":
        assert persistently(lambda: ask(api, lease)).status_code == 410
        lease = api.lease()
        assert claim(api, lease, 3) == [4, 5, 7]
        assert counts(api) == (92, 3, 5)
    else:
        assert slug(persistently(lambda: push(api, lease, 3, "train=1"))) == "unit-not-held"
        assert claim(api, lease, 2) == [5, 7]
        assert counted(api, lease, 3, "train=4")["step"] == 4
        assert counts(api) == (92, 2, 6)
    assert api.status()["epoch"] == 1


@pytest.mark.parametrize("key", ["out", "held", "back"])
def test_the_loss_of_one_key_is_noticed(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], valkey_url: str, key: str
) -> None:
    service = start_service(redis_url=valkey_url)
    api = connect(service.url)
    lease = started(api)
    with service.redis() as client:
        assert client.delete(api.redis_key(key)) == 1
    numbers = claim(api, lease, 4)
    assert numbers == ([1, 4, 5, 6] if key == "out" else [5, 6, 7, 8])
    assert counts(api)[2] == 3
    assert counts(api)[1] == (4 if key == "out" else 6)


@pytest.mark.parametrize("is_gathering", [False, True])
def test_a_state_takes_its_data_along(
    api: Api, service: ThreadService, connect: Callable[..., Api], is_gathering: bool
) -> None:
    policy = {"policy": "buffered", "batch": 2} if is_gathering else {"policy": "async"}
    lease = started(api, aggregation=policy)
    if is_gathering:
        counted(api, lease, 1, "train=4")
    state = export(api)
    spec = {"length": 100, "unit": 1, "passes": 1, "shuffle": "blocks", "seed": 0}
    # The pushes of an unfinished update are no part of an export, so their units are open in it.
    assert document_of(state)["data"] == {"train": {"spec": spec, "reached": 4, "open": [[1, 2]]}}
    other = connect(service.url)
    assert import_(other, state).status_code == 201
    assert counts(other) == (97, 0, 3)
    assert claim(other, other.lease(), 3) == [1, 4, 5]
    assert other.http.delete(other.path()).is_success


@pytest.mark.parametrize(
    "state",
    [
        {"reached": 4, "open": [[2, 1]]},
        {"reached": 4, "open": [[1, 2], [0, 1]]},
        {"reached": 4, "open": [[3, 5]]},
        {"reached": 101},
        {"reached": 2**53 - 1, "open": [[0, 2**53 - 2]]},
        {"reached": -1},
    ],
)
def test_a_state_whose_data_contradicts_itself_is_refused(
    api: Api, service: ThreadService, connect: Callable[..., Api], state: dict[str, Any]
) -> None:
    started(api)
    body = export(api)
    document = document_of(body)
    changes = dict(document["data"]["train"]) | {"open": []} | state
    if changes["reached"] > 2**52:
        changes["spec"] = {**changes["spec"], "passes": None}
    other = connect(service.url)
    answer = import_(other, changed(body, lambda document: document.update(data={"train": changes})))
    assert slug(answer) == "malformed-tensors"
    assert slug(other.http.get(other.path())) == "run-not-found"
