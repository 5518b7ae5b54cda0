"""Bodies in memory that a client shares: the same answers and refusals as over a connection, and who gets memory."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from freestep.api.token_form import make_token
from freestep.errors import MemoryNotShared
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.state.shared_memory import IS_POSSIBLE, SharedMemory
from harness import AUTHORIZED, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, TENSORS, Api, slug
from shared_bodies import Handed, fetch, offered, show

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")

UNKNOWN = "0" * 32
_NOBODY = 65534
_CLONE_NEWNET = 0x40000000


@pytest.fixture
def share(api: Api) -> Iterator[Callable[..., Handed]]:
    """Memory for a new lease of a run that has its weights."""
    with ExitStack() as stack:

        def make(worker: str = "worker", **sizes: int) -> Handed:
            if api.http.get(api.path()).status_code == 404:
                api.create()
            made = fetch(api, api.lease(worker), **sizes)
            stack.callback(made.close)
            return made

        yield make


def budget(service: ThreadService) -> MemoryBudget:
    return service.registry._resources.memory


def test_a_push_and_its_answer_are_those_of_a_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed, other = share(), Api(api.url)
    other.create()
    lease, want = other.lease(), {"Prefer": "return=representation"}
    for step in range(3):
        here, there = handed.push(step, **want), other.push(lease, step, **want)
        assert (here.status_code, there.status_code) == (200, 200)
        mine, its = safetensors.torch.load(handed.body(here)), safetensors.torch.load(there.content)
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
        assert here.headers["Cache-Control"] == "no-store"
        differing = {"cache-control", "content-length", "date", "freestep-span"}
        assert {name: here.headers[name] for name in here.headers if name not in differing} == {
            name: there.headers[name] for name in there.headers if name not in differing
        }
    receipt = handed.push(3)
    assert receipt.json() == {"decision": "applied", "step": 4, "staleness": 0, "replayed": False}
    other.http.delete(other.path())
    other.http.close()


def test_a_body_may_lie_anywhere_among_bodies(api: Api, share: Callable[..., Handed]) -> None:
    handed = share(body=len(BODY) + 100)
    handed.memory[100 : 100 + len(BODY)] = BODY
    headers = handed.headers(100, 100 + len(BODY), 0)
    assert api.http.post(api.path("/gradients"), headers=headers).json()["decision"] == "applied"


def test_a_point_is_pulled(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    for query in ({"point": "x"}, {"point": "y", "dtype": "BF16"}, {"point": "z", "dtype": "I8"}):
        plain = api.http.get(api.path("/parameters"), params=query)
        answer = api.http.get(api.path("/parameters"), params=query, headers=memory_of(handed))
        assert handed.body(answer) == plain.content
        assert answer.headers["ETag"] == plain.headers["ETag"]
    known = {**memory_of(handed), "If-None-Match": plain.headers["ETag"]}
    assert api.http.get(api.path("/parameters"), params=query, headers=known).status_code == 304


def memory_of(handed: Handed) -> dict[str, str]:
    return {"Freestep-Memory": handed.grant["memory"]}


def test_what_has_no_room_comes_over_the_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share(answer=0)
    answer = handed.push(0, Prefer="return=representation")
    assert "Freestep-Span" not in answer.headers
    assert safetensors.torch.load(answer.content).keys() == TENSORS.keys()


def test_ranges_and_heads_come_over_the_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    part = api.http.get(api.path("/parameters"), headers={**memory_of(handed), "Range": "bytes=0-9"})
    assert (part.status_code, len(part.content)) == (206, 10)
    head = api.http.head(api.path("/parameters"), headers=memory_of(handed))
    assert int(head.headers["Content-Length"]) > 0 and "Freestep-Span" not in head.headers


REFUSED: dict[str, tuple[dict[str, str], str, str | None]] = {
    "ends behind the bodies": ({"Freestep-Span": "0-4097"}, "malformed-request", "Freestep-Span"),
    "lies among answers": ({"Freestep-Span": "9000-9100"}, "malformed-request", "Freestep-Span"),
    "lies nowhere": ({"Freestep-Span": f"0-{10**17}"}, "body-too-large", None),
    "ends before it begins": ({"Freestep-Span": "10-9"}, "malformed-request", "Freestep-Span"),
    "is no span": ({"Freestep-Span": "all"}, "malformed-request", "Freestep-Span"),
    "is empty": ({"Freestep-Span": "0-0"}, "malformed-tensors", None),
    "is short": ({"Freestep-Span": f"0-{len(BODY) - 1}"}, "malformed-tensors", None),
    "is long": ({"Freestep-Span": f"0-{len(BODY) + 1}"}, "malformed-tensors", None),
    "lies in a memory that is not known": ({"Freestep-Memory": UNKNOWN}, "memory-not-shared", None),
    "lies in what is no name": ({"Freestep-Memory": "../x"}, "malformed-request", "Freestep-Memory"),
    "is of another shard": ({"Freestep-Lease": "another"}, "memory-not-shared", None),
    "is of another type": ({"Content-Type": "text/plain"}, "unsupported-media-type", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_is_refused_that(api: Api, service: ThreadService, share: Callable[..., Handed], name: str) -> None:
    changes, problem, field = REFUSED[name]
    handed = share()
    handed.memory[: len(BODY)] = BODY
    before = api.state(service)
    answer = api.http.post(api.path("/gradients"), headers={**handed.headers(0, len(BODY), 0), **changes})
    assert slug(answer) == problem
    assert answer.json().get("field") == field
    assert api.state(service) == before
    assert handed.push(0).json()["decision"] == "applied"


def test_a_span_needs_a_memory_and_no_other_body(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    headers = handed.headers(0, len(BODY), 0)
    twice = api.http.post(api.path("/gradients"), headers=headers, content=BODY)
    assert (slug(twice), twice.json()["field"]) == ("malformed-request", "Freestep-Span")
    del headers["Freestep-Memory"]
    nowhere = api.http.post(api.path("/gradients"), headers=headers)
    assert (slug(nowhere), nowhere.json()["field"]) == ("malformed-request", "Freestep-Span")
    # A memory alone is for the answer: the body comes as ever.
    del headers["Freestep-Span"]
    answer = api.http.post(api.path("/gradients"), headers={**headers, **memory_of(handed)}, content=BODY)
    assert answer.json()["decision"] == "applied"


def test_what_is_wrong_with_a_body_is_what_is_wrong_over_a_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    not_finite = safetensors.torch.save({**TENSORS, "b": torch.tensor(float("nan"))})
    other = safetensors.torch.save({**TENSORS, "b": torch.tensor(7.0)})
    assert slug(handed.push(0, body=not_finite)) == "non-finite-gradient"
    assert slug(handed.push(0, body=b"\xff" * 100)) == "malformed-tensors"
    assert handed.push(0, "once").json()["replayed"] is False
    assert handed.push(0, "once").json()["replayed"] is True
    assert slug(handed.push(0, "once", other)) == "idempotency-conflict"
    # One push, whichever way it comes again.
    assert api.push(handed.lease, 0, "once").json()["replayed"] is True
    assert slug(api.push(handed.lease, 0, "once", body=other)) == "idempotency-conflict"


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


@pytest.fixture
def watched_service(start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch) -> ThreadService:
    """A service that often looks whether leases have ended."""
    monkeypatch.setattr("freestep_service.web.memories._LOOK_S", 0.02)
    return start_service()


@pytest.fixture
def watched(watched_service: ThreadService) -> Iterator[Api]:
    """A run of it."""
    api = Api(watched_service.url)
    api.create()
    yield api
    api.http.close()


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


def test_offers_that_nobody_fetches_keep_no_memory_from_others(watched: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.web.memories._MOST", 1)
    offers = [offered(watched, watched.lease(worker)).json() for worker in "ab"]
    handed = fetch(watched, watched.lease())
    # There is one now.
    for offer in offers:
        connection, line, descriptors = show(offer)
        assert (line, descriptors) == (b"", [])
        connection.close()
    handed.close()


def test_there_are_so_many_memories(watched: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.web.memories._MOST", 1)
    first = fetch(watched, watched.lease())
    other = watched.lease("other")
    assert slug(offered(watched, other)) == "memory-not-shared"
    # It replaces its own.
    second = fetch(watched, first.lease)
    for each in (first, second):
        each.close()
    wait_until(lambda: offered(watched, other).status_code == 201)


def test_a_ticket_is_good_once(api: Api, share: Callable[..., Handed]) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    first, line, descriptors = show(offer)
    assert line and descriptors
    second, line, none = show(offer)
    assert (line, none) == (b"", [])
    for connection in (first, second):
        connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("ticket", ["", UNKNOWN, "x" * 1000, "\xff\xfe"])
def test_a_wrong_ticket_gets_nothing(api: Api, ticket: str) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    connection, line, descriptors = show({**offer, "ticket": ticket})
    assert (line, descriptors) == (b"", [])
    connection.close()


def test_a_ticket_that_nobody_shows_runs_out(
    watched: Api, watched_service: ThreadService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep_service.web.memories._TICKET_S", 0.05)
    offer = offered(watched, watched.lease()).json()
    memories = watched_service.app.state.context.memories
    wait_until(lambda: offer["ticket"] not in memories._tickets)
    connection, line, descriptors = show(offer)
    assert (line, descriptors) == (b"", [])
    connection.close()


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


def shared_bytes(api: Api) -> float:
    """What the metrics have of it."""
    lines = api.http.get("/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("freestep_shared_memory_bytes ")]
    return float(value)


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


def test_a_service_without_a_unix_socket_shares_none(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The name of the socket is too long for the system then.
    monkeypatch.setattr("freestep_service.web.memories._TICKET_BYTES", 100)
    api = Api(start_service().url)
    api.create()
    lease = api.lease()
    assert slug(offered(api, lease)) == "memory-not-shared"
    assert api.push(lease, 0).json()["decision"] == "applied"
    assert api.http.get("/readyz").json()["shared_memory"] is None
    assert sum("no memory is shared" in record.getMessage() for record in caplog.records) == 1
    api.http.close()


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


def _from_another_network(offer: dict[str, str], said: Any) -> None:
    assert ctypes.CDLL(None).unshare(_CLONE_NEWNET) == 0
    try:
        show(offer)
    except ConnectionRefusedError:
        said.send("refused")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave its network namespace")
def test_another_network_namespace_has_no_such_socket(api: Api) -> None:
    api.create()
    ours, theirs = get_context("fork").Pipe()
    offer = offered(api, api.lease()).json()
    child = get_context("fork").Process(target=_from_another_network, args=(offer, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "refused"
    child.join()


def _as_nobody(offer: dict[str, str], said: Any) -> None:
    os.setuid(_NOBODY)
    _, line, descriptors = show(offer)
    said.send((line, len(descriptors)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing_for_a_ticket(api: Api) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    ours, theirs = get_context("fork").Pipe()
    child = get_context("fork").Process(target=_as_nobody, args=(offer, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == (b"", 0)
    child.join()
    # It is good still, where it is shown by whom it was made for.
    connection, line, descriptors = show(offer)
    assert line and descriptors
    connection.close()
    os.close(descriptors[0])


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


def test_nothing_is_left_of_a_service(start_service: Callable[..., ThreadService]) -> None:
    service = start_service()
    api = Api(service.url)
    api.create()
    handed = fetch(api, api.lease())
    name = f"@{offered(api, api.lease('other')).json()['socket']}"
    assert name in unix_names()
    service.stop()
    assert handed.is_over
    assert name not in unix_names()
    handed.close()
    api.http.close()


def unix_names() -> list[str]:
    with open("/proc/net/unix") as table:
        return [line.split()[-1] for line in table]


def test_it_does_not_matter_how_a_client_behaves_at_the_socket(api: Api) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    idle = []
    for _ in range(100):
        idle.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        idle[-1].connect("\0" + offer["socket"])
    for each in idle:
        each.close()

    def is_handed() -> bool:
        connection, line, descriptors = show(offered(api, api.lease()).json())
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
        return bool(line)

    wait_until(is_handed)


def test_the_answer_is_counted_as_any(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    made = api.http.post(
        "/v1/tokens", json={"name": "t", "scope": "push", "max_bytes_per_minute": len(BODY) + 1}
    ).json()
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {made['token']}"}) as bound:
        handed.memory[: len(BODY)] = BODY
        headers = handed.headers(0, len(BODY), 0, Prefer="return=representation")
        assert bound.post(api.path("/gradients"), headers=headers).status_code == 200
        refused = bound.post(api.path("/gradients"), headers=handed.headers(0, len(BODY), 1))
        assert (slug(refused), refused.json()["quota"]) == ("overloaded", "bytes_per_minute")


@pytest.mark.parametrize("is_known", [True, False])
def test_a_body_that_was_not_had_is_not_counted(
    api: Api, share: Callable[..., Handed], is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = share()
    made = api.http.post(
        "/v1/tokens", json={"name": "t", "scope": "push", "max_bytes_per_minute": len(BODY) // 2}
    ).json()

    async def take(self: SharedMemory, *_: object) -> str:
        raise MemoryNotShared("another request is using the memory")

    headers = handed.headers(0, len(BODY), 0)
    if is_known:
        monkeypatch.setattr(SharedMemory, "take", take)
    else:
        headers["Freestep-Memory"] = UNKNOWN
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {made['token']}"}) as bound:
        for _ in range(3):
            assert slug(bound.post(api.path("/gradients"), headers=headers)) == "memory-not-shared"
        # All of it comes over the connection then, and uses the quota up.
        headers = api.headers(handed.lease, 0)
        assert bound.post(api.path("/gradients"), headers=headers, content=BODY).status_code == 200
        assert slug(bound.post(api.path("/gradients"), headers=headers, content=BODY)) == "overloaded"
