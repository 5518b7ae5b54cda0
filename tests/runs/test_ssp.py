"""Stale synchronous parallel, over plain HTTP: a worker that is too far ahead of the slowest one waits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import BODY, Api, slug
from raw_pushes import answered, begun_push

SSP = {"policy": "ssp", "slack": 1}


def ahead(api: Api, lease: dict[str, Any]) -> None:
    """Brings a worker as far ahead of one that has not pushed as it may come."""
    for _ in range(2):
        assert api.push(lease, 0).status_code == 200


def waits(service: ThreadService, api: Api, key: str) -> bool:
    """Whether a push has come to the service, of which Redis does not know yet."""
    pushes = service.registry.get(api.run).shard(0)._pushes
    return key in pushes._flights and not service.redis_dump(api.redis_key("pending"))


@pytest.fixture
def hasty(start_service: Callable[..., ThreadService]) -> ThreadService:
    """A service at which nobody waits for long."""
    return start_service(queue_seconds=0.2)


def test_who_is_too_far_ahead_is_refused_after_a_while(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation=SSP)
    fast, slow = api.lease("fast"), api.lease("slow")
    ahead(api, fast)
    before = api.state(hasty)
    answer = api.push(fast, 2, "early")
    assert (answer.status_code, slug(answer)) == (429, "overloaded")
    assert int(answer.headers["Retry-After"]) > 0
    assert api.state(hasty) == before
    assert api.push(slow, 0).json()["step"] == 3
    assert api.push(fast, 2, "early").json() == {"decision": "applied", "step": 4, "staleness": 1, "replayed": False}


def test_its_body_is_not_read(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation=SSP)
    fast, _ = api.lease("fast"), api.lease("slow")
    ahead(api, fast)
    with begun_push(api, fast, BODY[:8]) as connection:
        assert json.loads(answered(connection))["type"].endswith("overloaded")


def test_a_retry_of_what_was_decided_is_answered(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation=SSP)
    fast, _ = api.lease("fast"), api.lease("slow")
    api.push(fast, 0, "first")
    api.push(fast, 0)
    assert api.push(fast, 0, "first").json()["replayed"] is True


@pytest.fixture
def held(service: ThreadService, api: Api, connect: Callable[..., Api]) -> Iterator[Callable[..., Any]]:
    """Begins a push of `fast` that waits for `slow`; returns both leases and what becomes of the push."""

    def begin(**wish: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
        api.create(aggregation=SSP)
        fast, slow = api.lease("fast"), api.lease("slow", **wish)
        ahead(api, fast)
        waiting = under_way(partial(connect(service.url, api.run).push, fast, 2, "held"))
        return fast, slow, waiting

    yield begin


def test_it_goes_on_when_the_slowest_has_pushed(held: Callable[..., Any], service: ThreadService, api: Api) -> None:
    _, slow, waiting = held()
    wait_until(lambda: waits(service, api, "held"))
    assert api.push(slow, 0).json()["step"] == 3
    assert waiting.result().json()["step"] == 4


def test_it_goes_on_when_the_slowest_leaves(held: Callable[..., Any], service: ThreadService, api: Api) -> None:
    _, slow, waiting = held()
    wait_until(lambda: waits(service, api, "held"))
    api.http.delete(api.path(f"/leases/{slow['lease']}"))
    assert waiting.result().json()["step"] == 3


def test_it_goes_on_when_the_slowest_is_gone(held: Callable[..., Any], api: Api) -> None:
    _, _, waiting = held(ttl_ms=500)
    assert waiting.result().json()["step"] == 3
    assert [worker["worker"] for worker in api.status()["workers"]] == ["fast"]


def test_a_new_worker_starts_at_the_slowest_ones_count(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation=SSP)
    first, second = api.lease("first"), api.lease("second")
    for _ in range(3):
        assert [api.push(lease, 0).status_code for lease in (first, second)] == [200, 200]
    assert api.push(second, 0).status_code == 200
    third = api.lease("third")
    assert [api.push(first, 0).status_code for _ in range(3)] == [200, 200, 429]
    assert [api.push(third, 0).status_code for _ in range(2)] == [200, 200]


def test_a_new_lease_is_no_new_start(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation=SSP)
    ahead(api, api.lease("fast"))
    slow = api.lease("slow")
    assert api.push(api.lease("fast"), 0).status_code == 200
    assert api.push(api.lease("fast"), 0).status_code == 200
    assert api.push(api.lease("fast"), 0).status_code == 429
    api.push(slow, 0)
    assert api.push(api.lease("fast"), 0).status_code == 200


def test_given_to_another_policy_a_slack_holds_too(hasty: ThreadService, connect: Callable[..., Api]) -> None:
    api = connect(hasty.url)
    api.create(aggregation={"policy": "ringmaster", "max_staleness": 0, "slack": 0})
    fast, _ = api.lease("fast"), api.lease("slow")
    assert api.push(fast, 0).status_code == 200
    assert api.push(fast, 0).json()["decision"] == "dropped"
    assert api.push(fast, 1).status_code == 429


def test_ssp_needs_its_slack(api: Api) -> None:
    answer = api.http.put(api.path(), json=api.spec(aggregation={"policy": "ssp"}))
    assert (answer.status_code, slug(answer)) == (422, "invalid-spec")
    assert answer.json()["field"] == "aggregation.slack"


def test_nobody_is_ever_further_ahead(api: Api, service: ThreadService, connect: Callable[..., Api]) -> None:
    """Of workers that push as fast as they can, the log tells who was how far ahead."""
    api.create(aggregation={"policy": "ssp", "slack": 2})
    leases = {f"worker-{number}": api.lease(f"worker-{number}") for number in range(3)}
    callers = {worker: connect(service.url, api.run) for worker in leases}

    def work(worker: str, pushes: int) -> list[httpx.Response]:
        return [callers[worker].push(leases[worker], 0) for _ in range(pushes)]

    answers = at_once(*(partial(work, worker, 20) for worker in leases))
    assert {answer.status_code for each in answers for answer in each} == {200}
    counts = dict.fromkeys(leases, 0)
    for _, fields in service.redis_dump(api.redis_key("log"))[api.redis_key("log")]:
        counts[json.loads(json.loads(fields["entry"])["record"])["worker"]] += 1
        assert max(counts.values()) - min(counts.values()) <= 3
    assert set(counts.values()) == {20}
