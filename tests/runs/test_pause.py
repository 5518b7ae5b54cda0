"""Runs that are paused and resumed, over plain HTTP."""

from __future__ import annotations

from control_calls import ONES, change, events_of, w
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import BODY, SGD, Api, slug
from raw_pushes import answered, begun_push, is_pending


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
