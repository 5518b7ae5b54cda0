"""Workers whose leases an operator ends, and who get no other for a time."""

from __future__ import annotations

import pytest

from control_calls import ONES, end_worker, events_of, w
from meanwhile import wait_until
from plain_calls import SGD, Api, slug


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
