"""Leases: granted, renewed, released, expired, fenced off."""

from __future__ import annotations

from typing import Any

import pytest

from harness import ThreadService
from meanwhile import wait_until
from plain_calls import BODY, Api, slug


def test_a_lease_is_granted_renewed_and_released(api: Api) -> None:
    api.create()
    lease = api.lease("one", ttl_ms=5000)
    assert lease["worker"] == "one"
    assert lease["ttl_ms"] == 5000
    assert (lease["epoch"], lease["step"]) == (1, 0)
    api.push(lease, 0)
    renewed = api.http.put(api.path(f"/leases/{lease['lease']}"))
    assert renewed.status_code == 200
    assert renewed.json() == {**lease, "step": 1}
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    assert api.status()["workers"] == []


def test_a_lease_has_the_runs_time_to_live_unless_it_asks_for_its_own(api: Api) -> None:
    api.create(lease_ttl_ms=12_345)
    assert api.lease("one")["ttl_ms"] == 12_345
    assert api.lease("two", ttl_ms=500)["ttl_ms"] == 500


def test_tokens_rise(api: Api) -> None:
    api.create()
    tokens = [api.lease(worker)["token"] for worker in ("a", "b", "a", "c")]
    assert tokens == sorted(set(tokens))


def test_live_leases_are_listed_by_worker(api: Api) -> None:
    api.create()
    leases = [api.lease(worker) for worker in ("b", "a")]
    api.push(leases[0], 0)
    listed = api.http.get(api.path("/leases")).json()["leases"]
    assert [each["worker"] for each in listed] == ["a", "b"]
    assert (listed[1]["pushes"], listed[1]["step"], listed[1]["staleness"]) == (1, 0, 0)
    assert listed[1]["received_bytes"] == len(BODY)
    assert 0 < listed[0]["expires_in_ms"] <= 30_000


def test_a_lease_is_shown_to_its_holder_alone(api: Api) -> None:
    api.create()
    leases = {worker: api.lease(worker) for worker in ("a", "b")}
    for each in (api.path(), "/v1/runs", api.path("/leases")):
        shown = api.http.get(each, headers={"Freestep-Lease": leases["a"]["lease"]}).text
        assert leases["b"]["lease"] not in shown
        assert (leases["a"]["lease"] in shown) == (each == api.path("/leases"))
        shown = api.http.get(each).text
        assert not [lease for lease in leases.values() if lease["lease"] in shown]
    for holder in ("a", "b", "nobody"):
        own = leases.get(holder, {"lease": "0" * 32})
        listed = api.http.get(api.path("/leases"), headers={"Freestep-Lease": own["lease"]}).json()["leases"]
        for each in listed:
            is_own = each["worker"] == holder
            expected = (own["lease"], own["token"]) if is_own else (None, None)
            assert (each["lease"], each["token"]) == expected


def test_a_lease_shows_the_speed_that_its_last_push_told(api: Api) -> None:
    api.create()
    lease = api.lease()

    def speed() -> float | None:
        (listed,) = api.http.get(api.path("/leases")).json()["leases"]
        return None if listed["speed"] is None else float(listed["speed"])

    assert speed() is None
    for told in (2.5, 1 / 3):
        api.push(lease, 0, Freestep_Speed=repr(told))
        assert speed() == told
    api.push(lease, 0)
    assert speed() == 1 / 3
    assert api.lease()["token"] > lease["token"]
    assert speed() is None


def test_a_lease_is_given_before_the_run_has_weights(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    lease = api.lease()
    assert slug(api.push(lease, 0)) == "run-not-initialized"
    api.initialize()
    assert api.push(lease, 0).json()["step"] == 1


@pytest.mark.parametrize("end", ["unknown", "released", "superseded", "expired", "other-token"])
def test_what_is_no_longer_a_lease_pushes_nothing(api: Api, service: ThreadService, end: str) -> None:
    api.create()
    lease = api.lease("me", ttl_ms=100 if end == "expired" else 30_000)
    path = api.path(f"/leases/{lease['lease']}")
    if end == "unknown":
        lease = {**lease, "lease": "0" * 32}
        path = api.path(f"/leases/{lease['lease']}")
    elif end == "released":
        api.http.delete(path)
    elif end == "superseded":
        api.lease("me")
    elif end == "expired":
        wait_until(lambda: api.redis_key("leases") not in service.redis_dump(api.redis_key()))
    else:
        lease = {**lease, "token": lease["token"] + 1}
    before = api.state(service)
    answer = api.push(lease, 0)
    assert (answer.status_code, slug(answer)) == (410, "lease-expired")
    assert api.state(service) == before
    if end != "other-token":
        for answer in (api.http.put(path), api.http.delete(path)):
            assert (answer.status_code, slug(answer)) == (410, "lease-expired")
        assert api.state(service) == before


def test_a_push_renews_its_lease(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease(ttl_ms=60_000)
    ends = api.redis_key("leases")
    with service.redis() as client:
        granted = client.zscore(ends, "worker")
        # Until that clock has gone on.
        wait_until(lambda: client.time()[0] * 1000 + client.time()[1] // 1000 > granted - 60_000)
        assert api.push(lease, 0).status_code == 200
        assert client.zscore(ends, "worker") > granted


@pytest.mark.parametrize(
    "wish",
    [{}, {"worker": ""}, {"worker": "w" * 300}, {"worker": 7}, {"worker": "w", "ttl_ms": 1}, {"worker": "w", "x": 1}],
)
def test_a_malformed_wish_is_refused(api: Api, service: ThreadService, wish: dict[str, Any]) -> None:
    api.create()
    before = api.state(service)
    answer = api.http.post(api.path("/leases"), json=wish)
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")
    assert api.state(service) == before


def test_a_malformed_address_of_a_lease_is_refused(api: Api, service: ThreadService) -> None:
    api.create()
    api.lease()
    before = api.state(service)
    for path in (api.path("/leases/" + "l" * 201), "/v1/runs/no%20name/leases/l", "/v1/runs/name%0A/leases/l"):
        for method in ("PUT", "DELETE"):
            answer = api.http.request(method, path)
            assert (answer.status_code, slug(answer)) == (400, "malformed-request")
            assert answer.json()["field"]
    unknown = api.http.put("/v1/runs/nobody/leases/l")
    assert (unknown.status_code, slug(unknown)) == (404, "run-not-found")
    assert api.state(service) == before
