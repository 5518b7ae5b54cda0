"""Who gets memory to share, how much there is of it, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from freestep.api.token_form import make_token
from freestep_service.state.shared_memory import IS_POSSIBLE, SharedMemory
from harness import AUTHORIZED, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import Api, slug
from shared_bodies import Handed, budget, fetch, offered, shared_bytes, show

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")


def test_a_lease_that_ends_takes_its_memory_along(
    api: Api, service: ThreadService, share: Callable[..., Handed]
) -> None:
    free = budget(service).free
    handed = share()
    run_bytes = free - budget(service).free - handed.grant["size"]
    assert api.http.delete(api.path(f"/leases/{handed.lease['lease']}")).status_code == 204
    assert handed.is_over
    assert slug(handed.push(0)) == "memory-not-shared"
    wait_until(lambda: budget(service).free == free - run_bytes)


def test_a_lease_that_is_good_keeps_its_memory(watched: Api) -> None:
    handed = fetch(watched, watched.lease())
    ended = fetch(watched, watched.lease("other", ttl_ms=100))
    # It is looked at as often as this one, which is given up.
    assert ended.is_over
    assert handed.push(0).json()["decision"] == "applied"
    for each in (handed, ended):
        each.close()


def test_a_lease_that_is_fenced_off_is_refused(watched: Api) -> None:
    api, handed = watched, fetch(watched, watched.lease())
    assert api.lease()["token"] > handed.lease["token"]
    assert slug(handed.push(0)) in ("lease-expired", "memory-not-shared")
    assert slug(offered(api, handed.lease)) == "lease-expired"
    assert handed.is_over
    handed.close()


def test_an_epoch_that_ends_takes_its_memory_along(watched: Api) -> None:
    handed = fetch(watched, watched.lease())
    written = watched.http.post(watched.path("/checkpoints")).json()
    assert watched.http.post(watched.path(f"/checkpoints/{written['step']}/restore")).status_code == 200
    assert handed.is_over
    handed.close()


def test_a_run_that_is_deleted_takes_its_memory_along(watched: Api) -> None:
    handed = fetch(watched, watched.lease())
    assert watched.http.delete(watched.path()).status_code == 204
    assert handed.is_over
    handed.close()


def test_who_closes_the_connection_gives_the_memory_back(
    api: Api, service: ThreadService, share: Callable[..., Handed]
) -> None:
    api.create()
    free = budget(service).free
    handed = share()
    assert budget(service).free == free - handed.grant["size"]
    handed.close()
    wait_until(lambda: budget(service).free == free)
    assert slug(handed.push(0)) == "memory-not-shared"


def test_a_lease_has_one_memory(api: Api, service: ThreadService, share: Callable[..., Handed]) -> None:
    api.create()
    free = budget(service).free
    first = share()
    second = fetch(api, first.lease, body=8192)
    assert first.is_over
    assert slug(first.push(0)) == "memory-not-shared"
    assert second.push(0).json()["decision"] == "applied"
    second.close()
    wait_until(lambda: budget(service).free == free)


def test_an_offer_takes_no_memory_before_its_ticket_is_shown(
    api: Api, service: ThreadService, share: Callable[..., Handed]
) -> None:
    api.create()
    free = budget(service).free
    assert shared_bytes(api) == 0
    assert offered(api, api.lease()).status_code == 201
    assert budget(service).free == free
    handed = share()
    assert free - budget(service).free == shared_bytes(api) == handed.grant["size"]
    handed.close()
    wait_until(lambda: shared_bytes(api) == 0)


def test_memory_that_was_taken_after_the_offer_is_not_given(api: Api, service: ThreadService) -> None:
    api.create()
    offer, free = offered(api, api.lease()).json(), budget(service).free
    assert budget(service).try_reserve(free)
    try:
        connection, line, descriptors = show(offer)
        assert (line, descriptors) == (b"", [])
        assert budget(service).free == 0
    finally:
        budget(service).release(free)
    connection.close()


def test_memory_that_the_machine_has_not_is_not_given(
    api: Api, service: ThreadService, share: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = share().grant["size"]
    lease, free = api.lease("other"), budget(service).free
    monkeypatch.setattr("freestep_service.web.memories.available_memory", lambda: 2 * size - 1)
    connection, line, descriptors = show(offered(api, lease).json())
    assert (line, descriptors) == (b"", [])
    connection.close()
    wait_until(lambda: budget(service).free == free)
    monkeypatch.setattr("freestep_service.web.memories.available_memory", lambda: 2 * size)
    fetch(api, lease).close()


def test_memories_make_room_for_runs(api: Api, service: ThreadService, share: Callable[..., Handed]) -> None:
    first, second = share("first"), share("second")
    free, size = budget(service).free, first.grant["size"]
    assert budget(service).try_reserve(free)
    other = Api(api.url)
    try:
        other.create()
        assert first.is_over
        wait_until(lambda: budget(service).free >= 0)
        assert slug(first.push(0)) == "memory-not-shared"
        # As many as it takes.
        assert second.push(0).json()["decision"] == "applied"
        assert budget(service).free < size
    finally:
        budget(service).release(free)
    other.http.delete(other.path())
    other.http.close()


def test_threads_of_their_own_make_pages_and_free_them(
    api: Api, share: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, freed = [], threading.Event()

    class Noted(SharedMemory):
        def __init__(self, layout: Any, locks: Any, threads: Any, done: Callable[[], None]) -> None:
            made.append(threading.current_thread().name)
            assert not threads.submit(lambda: made.append(threading.current_thread().name)).exception()
            super().__init__(layout, locks, threads, lambda: (done(), freed.set()))

    monkeypatch.setattr("freestep_service.web.memories.SharedMemory", Noted)
    share().close()
    assert freed.wait(60)
    assert len(made) == 2 and all(name.startswith("freestep-pages") for name in made)


def test_a_lease_that_ends_while_its_memory_is_made_leaves_nothing(
    api: Api, service: ThreadService, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class Slow(SharedMemory):
        def __init__(self, *arguments: Any) -> None:
            begun.set()
            assert goes_on.wait(60)
            super().__init__(*arguments)

    monkeypatch.setattr("freestep_service.web.memories.SharedMemory", Slow)
    api.create()
    lease, free = api.lease(), budget(service).free
    showing = under_way(lambda: show(offered(api, lease).json()))
    assert begun.wait(60)
    with httpx.Client(base_url=api.url, headers=AUTHORIZED) as http:
        assert http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    goes_on.set()
    connection, line, descriptors = showing.result()
    assert (line, descriptors) == (b"", [])
    wait_until(lambda: budget(service).free == free)
    assert "memfd:freestep" not in Path("/proc/self/maps").read_text()
    connection.close()


WISHES: dict[str, tuple[dict[str, Any], str]] = {
    "another token": ({"token": 0}, "lease-expired"),
    "a shard that there is not": ({"shard": 1}, "memory-not-shared"),
    "no size": ({"body_bytes": None}, "malformed-request"),
    "a size below 0": ({"body_bytes": -1}, "malformed-request"),
    "what is not known": ({"more": 1}, "malformed-request"),
}


@pytest.mark.parametrize("name", WISHES)
def test_there_is_no_memory_for(api: Api, service: ThreadService, name: str) -> None:
    wish, problem = WISHES[name]
    api.create()
    lease = api.lease()
    free = budget(service).free
    assert slug(offered(api, lease, **{"body": 4096, **wish})) == problem
    assert slug(offered(api, {**lease, "lease": "another"})) == "lease-expired"
    assert budget(service).free == free


def test_no_memory_is_larger_than_what_it_can_be_needed_for(api: Api, share: Callable[..., Handed]) -> None:
    handed = share(body=10**15, answer=10**15)
    assert handed.grant["size"] < 1_000_000
    answer = handed.push(0, Prefer="return=representation")
    assert handed.body(answer)


def test_the_token_of_another_run_gets_none(api: Api) -> None:
    api.create()
    lease = api.lease()
    made = api.http.post("/v1/tokens", json={"name": "t", "scope": "push", "runs": "other-*"}).json()
    for token, problem in ((made["token"], "forbidden"), (make_token("push"), "unauthenticated")):
        api.http.headers.update({"Authorization": f"Bearer {token}"})
        assert slug(offered(api, lease)) == problem
    api.http.headers.update(AUTHORIZED)


def test_where_it_is_turned_off_there_is_none(start_service: Callable[..., ThreadService]) -> None:
    api = Api(start_service(shared_memory=False).url)
    api.create()
    answer = offered(api, api.lease())
    assert (answer.status_code, slug(answer)) == (409, "memory-not-shared")
    api.http.close()


def test_it_counts_against_the_memory_of_runs(start_service: Callable[..., ThreadService]) -> None:
    api = Api(start_service(memory_bytes=50_000).url)
    api.create()
    answer = offered(api, api.lease())
    assert slug(answer) == "memory-not-shared"
    assert "memory_bytes" in answer.json()["detail"]
    api.http.close()


def test_as_much_is_left_for_runs(api: Api, service: ThreadService, share: Callable[..., Handed]) -> None:
    size = share().grant["size"]
    taken = budget(service).free - 2 * size + 1
    assert budget(service).try_reserve(taken)
    other = api.lease("other")
    try:
        assert slug(offered(api, other)) == "memory-not-shared"
    finally:
        budget(service).release(taken)
    assert offered(api, other).status_code == 201
