"""Events of runs over HTTP: what is told, where a reader goes on, and when a stream ends."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import httpx
import pytest

from asgi_calls import Sender, scope_of
from freestep import Client, MalformedRequest, RunNotFound
from freestep.api.events import EpochEvent, GapEvent, PushEvent, RunEvent
from freestep_service.runs.events import RunEvents
from freestep_service.web.event_stream import EventStream
from harness import OWN_HEAD, ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import Api, ShardedApi, slug
from raw_pushes import answered, connected


def kinds(events: list[RunEvent]) -> list[str]:
    return [event.kind for event in events]


def so_far(api: Api, after: str | None = None, **how: Any) -> list[RunEvent]:
    """The events of a run that are known."""
    with Client(api.url) as client:
        return list(client.run(api.run).events(after, follow=False, **how))


def pushes(api: Api, lease: dict[str, Any], first: int, count: int) -> None:
    """Pushes that are applied, each at the newest step, which is `first` before them."""
    for step in range(first, first + count):
        answer = api.push(lease, step, Freestep_Loss="0.5", Freestep_Samples="4")
        assert answer.status_code == 200, answer.text


@contextmanager
def reading(api: Api, after: str | None = None) -> Iterator[Iterator[RunEvent]]:
    """Who follows a run."""
    with Client(api.url, retry_for=60) as client, closing(client.run(api.run).events(after)) as events:  # type: ignore[type-var]
        yield events


def ring(service: ThreadService, api: Api) -> RunEvents:
    return service.registry.get(api.run).events


def test_what_happens_is_told_in_order(api: Api) -> None:
    api.create()
    lease = api.lease("me")
    pushes(api, lease, 0, 2)
    assert api.http.post(api.path("/metrics"), json={"name": "acc", "value": 0.5, "step": 2}).status_code == 200
    assert api.http.put(api.path("/data/train"), json={"length": 10, "unit": 2}).status_code == 201
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    events = [event for event in so_far(api) if event.kind not in ("checkpoint", "shards")]
    assert kinds(events) == ["epoch", "lease", "push", "push", "metric", "data", "lease"]
    push = events[2]
    assert isinstance(push, PushEvent)
    assert push.model_dump() == {
        "kind": "push",
        "id": "1-1",
        "epoch": 1,
        "step": 1,
        "worker": "me",
        "decision": "applied",
        "reason": None,
        "staleness": 0,
        "loss": 0.5,
        "samples": 4.0,
        "units": {},
        "coalesced": 1,
    }
    written = [event.step for event in so_far(api) if event.kind == "checkpoint"]
    assert written[-1] == 2


def test_dropped_pushes_and_ends_of_leases_are_told(api: Api) -> None:
    api.create(aggregation={"policy": "async", "max_staleness": 0})
    lease = api.lease("me")
    pushes(api, lease, 0, 2)
    assert api.push(lease, 0).json()["decision"] == "dropped"
    api.lease("short", ttl_ms=100)
    with reading(api) as events:
        told = []
        for event in events:
            told.append(event)
            if event.kind == "lease" and getattr(event, "change", "") == "expired":
                break
    dropped = [event for event in told if isinstance(event, PushEvent) and event.decision == "dropped"]
    assert [(event.reason, event.staleness, event.step, event.id[:4]) for event in dropped] == [("stale", 2, 2, "1-2.")]


def test_an_update_that_an_ended_lease_completes_is_told(api: Api) -> None:
    api.create(aggregation={"policy": "sync"})
    leases = [api.lease(worker) for worker in ("a", "b")]
    assert api.push(leases[0], 0).json()["decision"] == "accumulated"
    assert api.http.delete(api.path(f"/leases/{leases[1]['lease']}")).status_code == 204
    assert kinds(so_far(api))[-1] == "update"


def test_a_reader_goes_on_behind_its_last_event_while_pushes_come(api: Api) -> None:
    api.create()
    lease = api.lease()
    pushing = under_way(lambda: pushes(api, lease, 0, 60))
    seen: list[RunEvent] = []
    reader = Api(api.url, api.run)
    while not seen or seen[-1].step < 60:
        with reading(reader, seen[-1].id if seen else None) as events:
            for event in events:
                seen.append(event)
                if len(seen) % 7 == 0 or event.step == 60:
                    break
    pushing.result(60)
    assert [event.step for event in seen if event.kind == "push"] == list(range(1, 61))
    assert "gap" not in kinds(seen)
    reader.http.close()


def test_a_stream_is_plain_server_sent_events(api: Api) -> None:
    api.create()
    answer = api.http.get(api.path("/events"), params={"follow": "false"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *blocks = answer.text.split("\n\n")
    assert first == "retry: 1000"
    lines = dict(line.split(": ", 1) for line in blocks[0].split("\n"))
    assert lines["event"] == "epoch" and lines["id"].startswith("1-0.")
    assert json.loads(lines["data"])["id"] == lines["id"]
    assert api.http.head(api.path("/events")).content == b""


@pytest.mark.parametrize(
    ("headers", "query", "field"),
    [
        ({"Last-Event-ID": "yesterday"}, {}, "Last-Event-ID"),
        ({"Last-Event-ID": "1-99"}, {}, "Last-Event-ID"),
        ({}, {"from": "1_0"}, "from"),
        ({}, {"follow": "on"}, "follow"),
    ],
)
def test_a_wrong_place_is_refused(api: Api, headers: dict[str, str], query: dict[str, str], field: str) -> None:
    api.create()
    answer = api.http.get(api.path("/events"), headers=headers, params=query)
    assert (answer.status_code, slug(answer), answer.json()["field"]) == (400, "malformed-request", field)


def test_a_place_in_a_run_that_was_deleted_is_refused(api: Api) -> None:
    api.create()
    pushes(api, api.lease(), 0, 2)
    last = so_far(api)[-1].id
    assert api.http.delete(api.path()).status_code == 204
    api.create()
    answer = api.http.get(api.path("/events"), headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["field"]) == (400, "Last-Event-ID")
    assert "of an earlier run of this name" in answer.json()["detail"]
    assert {event.epoch for event in so_far(api)} == {2}


def test_events_from_a_step_on(api: Api) -> None:
    api.create()
    lease = api.lease()
    pushes(api, lease, 0, 5)
    assert [event.step for event in so_far(api, from_step=4)] == [4, 5]


def test_a_run_that_goes_back_is_in_a_new_epoch_and_nothing_is_missing(api: Api) -> None:
    api.create()
    lease = api.lease()
    pushes(api, lease, 0, 2)
    step = api.http.post(api.path("/checkpoints")).json()["step"]
    pushes(api, lease, 2, 1)
    (*_, last) = so_far(api)
    assert api.http.post(api.path(f"/checkpoints/{step}/restore")).status_code == 200
    began, *_ = [event for event in so_far(api, last.id) if event.kind != "shards"]
    assert isinstance(began, EpochEvent)
    assert (began.epoch, began.step) == (2, 2)


def test_a_reader_that_takes_nothing_holds_up_no_push(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    events = ring(service, api)
    with connected(api.url) as stalled:
        stalled.sendall(f"GET {api.path('/events')} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
        wait_until(lambda: events.readers == 1)
        pushes(api, lease, 0, 50)
        assert len([event for event in so_far(api) if event.kind == "push"]) == 50
    wait_until(lambda: events.readers == 0)


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_ends_with_its_token(
    api: Api, service: ThreadService, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create()
    token = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read", "expires_in": 600}).json()
    headers = {"Authorization": f"Bearer {token['token']}"}
    with httpx.stream("GET", f"{api.url}{api.path('/events')}", headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        while "epoch" not in next(lines):
            pass
        if how == "revoked":
            assert api.http.delete(f"/v1/tokens/{token['id']}").status_code == 204
        else:
            monkeypatch.setattr(service.app.state.context.tokens, "_clock", lambda: time.time() + 600)
        api.lease("secret")
        # To its end.
        assert not any("secret" in line for line in lines)
    assert "secret" in str(so_far(api))


def test_readers_of_a_deleted_run_are_told_that_it_is_gone(api: Api) -> None:
    api.create()
    with reading(api) as events:
        next(events)
        assert api.http.delete(api.path()).status_code == 204
        with pytest.raises(RunNotFound):
            list(events)
    with pytest.raises(RunNotFound):
        so_far(api)


def test_sigterm_ends_streams(start_process: Callable[..., ProcessService], connect: Callable[..., Api]) -> None:
    service = start_process()
    api = connect(service.url, f"run-{uuid.uuid4().hex[:8]}")
    api.create()
    other = connect(service.url, api.run)
    with other.http.stream("GET", api.path("/events")) as stream:
        lines = stream.iter_lines()
        next(lines)
        with connected(api.url) as stalled:
            stalled.sendall(f"GET {api.path('/events')} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
            stalled.recv(1)
            service.send_signal(signal.SIGTERM)
            # It ends as a whole: a body cut off would raise.
            assert any(line.startswith("data: ") for line in lines)
    service.stop()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_reader_goes_on_over_a_restart(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], is_killed: bool
) -> None:
    service = start_process()
    api = connect(service.url, f"run-{uuid.uuid4().hex[:8]}")
    api.create(durability="journal")
    pushes(api, api.lease(), 0, 5)
    seen: list[RunEvent] = []
    # Killed, a service replays what came behind its checkpoint: also what the reader has not had.
    has_had = 3 if is_killed else 5
    with reading(api) as events:
        read_until(events, has_had, seen)
        if is_killed:
            service.kill()
        else:
            service.stop()
        service.start()
        pushes(api, api.lease("another"), 5, 2)
        read_until(events, 7, seen)
    assert [event.step for event in seen if event.kind == "push"] == list(range(1, 8))
    assert [event.entries for event in seen if isinstance(event, GapEvent)] in ([0], [])
    assert {event.epoch for event in seen} == {1}


def read_until(events: Iterator[RunEvent], step: int, seen: list[RunEvent]) -> None:
    """Reads up to the push that makes a step."""
    while not (seen and seen[-1].kind == "push" and seen[-1].step == step):
        seen.append(next(events))


def test_any_process_tells_of_a_run_that_others_own(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    api = ShardedApi(nodes[0].url)
    api.create(shards=2)
    lease = api.lease("a")
    assert api.http.post(api.path("/metrics"), json={"name": "acc", "value": 0.5, "step": 0}).status_code == 200
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    others = [connect(node.url, api.run) for node in nodes]

    def all_told() -> bool:
        told = [[event.id for event in so_far(other)] for other in others]
        return told[0] == told[1] and [kinds(so_far(other)).count("lease") for other in others] == [2, 2]

    # Messages of leases come when they come.
    wait_until(all_told)
    assert {"epoch", "shards", "metric"} <= set(kinds(so_far(others[0])))
    api.http.close()


def test_a_place_ahead_is_refused_by_the_client_too(api: Api) -> None:
    api.create()
    with pytest.raises(MalformedRequest):
        so_far(api, "7-1")


def test_too_many_readers_are_refused(api: Api, service: ThreadService) -> None:
    api.create()
    events = ring(service, api)
    for number in range(100):
        events.reader(who=str(number)).__enter__()
    answer: httpx.Response = api.http.get(api.path("/events"))
    assert (answer.status_code, slug(answer)) == (429, "overloaded")


def test_one_token_leaves_places_for_others(api: Api, service: ThreadService) -> None:
    api.create()
    token = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read"}).json()["token"]
    request = f"GET {api.path('/events')} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"
    events = ring(service, api)
    with ExitStack() as stack:
        greedy = [stack.enter_context(connected(api.url)) for _ in range(100)]
        for number, connection in enumerate(greedy):
            connection.sendall(request.encode())
            wait_until(lambda number=number: events.readers == number + 1)
        assert so_far(api)
        assert b"retry: " in answered(greedy[0])


@pytest.mark.parametrize("cause", ["its token has ended", "its place is needed", "it has come to its end"])
def test_a_part_of_what_there_is_does_not_look_like_all_of_it(cause: str) -> None:
    events = RunEvents()
    events.begin(1, 0, 0)
    for _ in range(1000):
        events.lease("granted", "worker")
    reader = events.reader()
    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(message)
        if cause == "its place is needed":
            reader.oust()

    stream = EventStream(reader, lambda: cause != "its token has ended" or len(said) < 5, follows=False)
    asyncio.run(stream(scope_of("GET", "/v1/runs/run/events"), Sender(()).receive, send))
    assert said[-1]["more_body"] == (cause != "it has come to its end")
