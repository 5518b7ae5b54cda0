"""Quotas of tokens, over HTTP: what is over one is refused, named, and changes nothing."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from freestep.client import Client
from freestep.errors import Overloaded
from harness import ThreadService
from meanwhile import at_once, wait_until
from plain_calls import Api, slug


@pytest.fixture
def bounded(connect: Callable[..., Api], service: ThreadService) -> Callable[..., Api]:
    """Makes `Api`s of runs under a push token of a quota."""

    def make(token: str = "", **quota: int) -> Api:
        if not token:
            with Client(service.url) as client:
                token = client.create_token("fleet", "push", **quota).token
        api = connect(service.url)
        api.http.headers["Authorization"] = f"Bearer {token}"
        return api

    return make


def also(api: Api, connect: Callable[..., Api]) -> Api:
    """Another run under the same token."""
    other = connect(api.url)
    other.http.headers["Authorization"] = api.http.headers["Authorization"]
    return other


def refusal(answer: httpx.Response) -> tuple[int, str, Any, Any, Any]:
    document = answer.json()
    assert int(answer.headers["Retry-After"]) > 0
    return answer.status_code, slug(answer), document["quota"], document["limit"], document.get("used")


def test_runs_are_bounded_until_one_is_deleted(
    service: ThreadService, bounded: Callable[..., Api], connect: Callable[..., Api]
) -> None:
    first = bounded(max_runs=1)
    second = also(first, connect)
    first.create()
    # It is there: nothing more is taken.
    assert first.http.put(first.path(), json=first.spec()).status_code == 200
    refused = second.http.put(second.path(), json=second.spec())
    assert refusal(refused) == (429, "overloaded", "runs", 1, 1)
    assert slug(second.http.get(second.path())) == "run-not-found"
    assert service.redis_dump(second.redis_key()) == {}
    admin = connect(service.url)
    assert admin.http.delete(first.path()).status_code == 204
    second.create()


def test_parameters_are_bounded(bounded: Callable[..., Api], connect: Callable[..., Api]) -> None:
    first = bounded(max_parameters=13)
    second = also(first, connect)
    first.create()
    assert refusal(second.http.put(second.path(), json=second.spec())) == (429, "overloaded", "parameters", 13, 7)
    small = second.spec(parameters=[{"name": "w", "shape": [6]}])
    assert second.http.put(second.path(), json=small).status_code == 201


def test_a_run_that_two_processes_create_at_once_counts_as_what_it_is(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    with Client(nodes[0].url) as client:
        token = client.create_token("fleet", "push", max_parameters=100)
    weights: dict[str, int] = {}
    for size in (90, 95, 85) * 3:
        apis = [connect(node.url, f"run-{uuid.uuid4().hex}") for node in nodes]
        name = apis[0].run

        def create(api: Api, elements: int, name: str = name) -> httpx.Response:
            api.http.headers["Authorization"] = f"Bearer {token.token}"
            spec = api.spec(parameters=[{"name": "w", "shape": [elements]}])
            return api.http.put(f"/v1/runs/{name}", json=spec)

        answers = at_once(lambda: create(apis[0], size), lambda: create(apis[1], 1))  # type: ignore[misc] # noqa: B023
        made = [answer.json()["parameter_count"] for answer in answers if answer.status_code == 201]
        weights |= {name: made[0]} if made else {}
        assert len(made) <= 1
        assert sum(weights.values()) <= 100
        with nodes[0].redis() as redis:
            listed: dict[str, Any] = redis.hgetall(f"freestep:quota:{token.id}:runs")  # type: ignore[assignment]
        assert {run: json.loads(listed[run])["weight"] for run in weights} == weights
    admin = connect(nodes[0].url)
    for name in weights:
        admin.http.delete(f"/v1/runs/{name}")


def test_leases_are_bounded_until_one_is_released(bounded: Callable[..., Api], connect: Callable[..., Api]) -> None:
    api = bounded(max_leases=1)
    other = also(api, connect)
    api.create()
    other.create()
    api.lease("a")
    lease = api.lease("a")
    refused = other.http.post(other.path("/leases"), json={"worker": "a"})
    assert refusal(refused) == (429, "overloaded", "leases", 1, 1)
    assert other.http.get(other.path("/leases")).json() == {"leases": []}
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    other.lease("a")


def test_bytes_are_bounded_at_pushes_and_pulls(bounded: Callable[..., Api], connect: Callable[..., Api]) -> None:
    api = bounded(max_bytes_per_minute=1)
    spec = api.spec()
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize().status_code == 201
    before = api.status()
    pulled = api.http.get(api.path("/parameters"))
    lease = api.lease()
    pushed = api.push(lease, 0)
    for refused in (pulled, pushed):
        assert refusal(refused) == (429, "overloaded", "bytes_per_minute", 1, None)
        # A whole body is over the quota by many minutes.
        assert int(refused.headers["Retry-After"]) > 60
    assert {**api.status(), "workers": []} == before


def test_an_exported_state_counts(bounded: Callable[..., Api], connect: Callable[..., Api]) -> None:
    api = bounded(max_bytes_per_minute=1)
    connect(api.url, api.run).create()
    assert api.http.get(api.path("/state")).status_code == 200
    assert refusal(api.http.get(api.path("/state"))) == (429, "overloaded", "bytes_per_minute", 1, None)
    assert refusal(api.http.get(api.path("/parameters"))) == (429, "overloaded", "bytes_per_minute", 1, None)


def test_a_client_does_not_wait_for_a_quota_that_stays_used_up(
    bounded: Callable[..., Api], service: ThreadService
) -> None:
    api = bounded(max_runs=0)
    token = api.http.headers["Authorization"].removeprefix("Bearer ")
    with Client(service.url, token=token, retry_for=1e6) as client, pytest.raises(Overloaded, match="quota of 0 runs"):
        client.run(api.run).create(api.spec())


def test_push_tokens_have_the_services_defaults_and_admins_none(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(push_max_runs=0)
    with Client(service.url) as client:
        own, other = client.create_token("a", "push"), client.create_token("b", "push", max_runs=1)
        assert [each.max_runs for each in client.tokens()[-2:]] == [None, 1]
    api = connect(service.url)
    api.http.headers["Authorization"] = f"Bearer {own.token}"
    assert refusal(api.http.put(api.path(), json=api.spec())) == (429, "overloaded", "runs", 0, 0)
    api.http.headers["Authorization"] = f"Bearer {other.token}"
    assert api.http.put(api.path(), json=api.spec()).status_code == 201
    connect(service.url).create()


def test_runs_count_after_the_store_has_lost_its_data(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    with Client(service.url) as client:
        token = client.create_token("fleet", "push", max_runs=1).token
    api = connect(service.url)
    api.http.headers["Authorization"] = f"Bearer {token}"
    api.create()
    service.stop()
    again = start_service(service.settings.data_dir)
    with again.redis() as redis:
        assert [key for key in redis.keys("freestep:quota:*:runs") if redis.hkeys(key) == [api.run]]
    other = connect(again.url)
    other.http.headers["Authorization"] = f"Bearer {token}"
    assert refusal(other.http.put(other.path(), json=other.spec())) == (429, "overloaded", "runs", 1, 1)


def test_runs_count_while_they_are_there_whatever_becomes_of_the_list(
    service: ThreadService, bounded: Callable[..., Api], connect: Callable[..., Api]
) -> None:
    """Redis loses it under a service that lives on, or the token takes nothing for longer than its list is kept."""
    api = bounded(max_runs=1)
    api.create()
    with service.redis() as redis:
        (key,) = [key for key in redis.keys("freestep:quota:*:runs") if api.run in redis.hkeys(key)]
        redis.pexpire(key, 600_000)
        wait_until(lambda: redis.pttl(key) > 600_000)
        redis.delete(key)
        wait_until(lambda: redis.hkeys(key) == [api.run])
    other = also(api, connect)
    assert refusal(other.http.put(other.path(), json=other.spec())) == (429, "overloaded", "runs", 1, 1)


def test_leases_that_are_granted_and_released_at_once_are_counted(
    bounded: Callable[..., Api], service: ThreadService
) -> None:
    """The next lease of a worker may be granted between the end of the last and its being taken off the list."""
    api = bounded(max_leases=1)
    api.create()
    token = api.http.headers["Authorization"]

    def granted(worker: str) -> httpx.Response:
        return httpx.post(api.url + api.path("/leases"), json={"worker": worker}, headers={"Authorization": token})

    lease = api.lease("a")["lease"]
    for _ in range(40):
        released, grant = at_once(
            lambda lease=lease: httpx.delete(  # type: ignore[misc]
                api.url + api.path(f"/leases/{lease}"), headers={"Authorization": token}
            ),
            lambda: granted("a"),
        )
        assert grant.status_code == 201
        with service.redis() as redis:
            live = redis.zrange(api.redis_key("leases"), 0, -1)
            listed = [name for key in redis.keys("freestep:quota:*:leases") for name in redis.hkeys(key)]
        assert {f"{api.run} {worker}" for worker in live} <= set(listed)
        assert released.status_code in (204, 409, 410)
        lease = grant.json()["lease"] if live else api.lease("a")["lease"]
    assert refusal(granted("b")) == (429, "overloaded", "leases", 1, 1)
