"""Processes find out how many others are live, and that no other host has their URL."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

import forked
from coordination.driven import Driver
from freestep_service.coordination.nodes import Node, Stopwatch, host_identity
from freestep_service.coordination.store import Store
from freestep_service.domain.records import UrlInUse

NODES, HOSTS = "freestep:nodes", "{freestep:nodes}:hosts"
TTL_MS = 3_600_000
URL = "http://127.0.0.1:8000"


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _nobody(driver: Driver) -> Iterator[None]:
    driver.redis.delete(NODES, HOSTS)
    yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., Node]:
    async def no_sleep(_: float) -> None:
        raise AssertionError("the node waits")

    def made(url: str = URL, host: str = "here boot-1", sleep: Callable[[float], Awaitable[None]] = no_sleep) -> Node:
        return Node(url, TTL_MS, host=host, clock=clock, sleep=sleep)

    return made


def beat(driver: Driver, *nodes: Node) -> None:
    for node in nodes:
        driver.do(node.heartbeat(driver.store))


def run_out(driver: Driver, *nodes: Node) -> None:
    """Has the registrations of processes run out."""
    driver.redis.zadd(NODES, {node.id: 1 for node in nodes})


# Counting


def test_live_processes_are_counted(driver: Driver, make: Callable[..., Node]) -> None:
    nodes = [make(f"http://host:{port}") for port in range(3)]
    beat(driver, *nodes, *nodes)
    assert [node.live_peers for node in nodes] == [2, 2, 2]
    assert [nodes[0].share(shards) for shards in (1, 3, 4)] == [1, 1, 2]
    assert driver.redis.zcard(NODES) == driver.redis.hlen(HOSTS) == 3


def test_a_process_that_is_gone_counts_for_a_while(driver: Driver, make: Callable[..., Node], clock: Clock) -> None:
    stays, leaves = make("http://a:1"), make("http://b:1")
    beat(driver, stays, leaves, stays)
    run_out(driver, leaves)
    beat(driver, stays)
    assert stays.live_peers == 1
    clock.now += TTL_MS / 1000 + 1
    # Redis has been silent meanwhile, for others too.
    beat(driver, stays)
    assert stays.live_peers == 1
    for _ in range(3):
        clock.now += TTL_MS / 2000
        beat(driver, stays)
    assert stays.live_peers == 0
    assert driver.redis.hkeys(HOSTS) == [stays.id]


def test_a_process_that_leaves_is_counted_no_more(driver: Driver, make: Callable[..., Node]) -> None:
    first, second = make("http://a:1"), make("http://b:1")
    beat(driver, first, second)
    driver.do(first.leave(driver.store))
    third = make("http://c:1")
    beat(driver, third)
    assert third.live_peers == 1


def test_both_keys_are_on_one_server_of_a_cluster() -> None:
    assert key_slot(NODES.encode()) == key_slot(HOSTS.encode())


# One URL on two hosts


def test_a_process_comes_back_at_once_on_its_host(driver: Driver, make: Callable[..., Node]) -> None:
    beat(driver, make(), make())
    assert driver.redis.zcard(NODES) == 2


def test_a_url_that_another_host_has_is_refused(driver: Driver, make: Callable[..., Node]) -> None:
    first = make()

    async def other_lives(_: float) -> None:
        before = driver.redis.zscore(NODES, first.id)
        while driver.redis.zscore(NODES, first.id) == before:
            await first.heartbeat(driver.store)

    second = make(host="there boot-2", sleep=other_lives)
    beat(driver, first)
    with pytest.raises(UrlInUse) as refused:
        beat(driver, second)
    assert str(refused.value).startswith(
        f"{URL} is the URL of a service on the host here already, and this one runs on"
    )
    assert "on there: set advertise_url" in str(refused.value)
    assert driver.redis.zrange(NODES, 0, -1) == driver.redis.hkeys(HOSTS) == [first.id]


def test_a_url_of_another_host_is_free_when_that_process_is_gone(
    driver: Driver, make: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    first, pauses = make(), 0

    async def time_passes(_: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 3:
            run_out(driver, first)

    second = make(host="there boot-2", sleep=time_passes)
    beat(driver, first)
    with caplog.at_level(logging.WARNING, "freestep"):
        beat(driver, second, second)
    assert driver.redis.zrange(NODES, 0, -1) == driver.redis.hkeys(HOSTS) == [second.id]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "host here until lately" in caplog.text


def test_a_url_that_another_host_takes_later_is_logged_once(
    driver: Driver, make: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(), make(host="there boot-2")
    beat(driver, first)
    run_out(driver, first)
    beat(driver, second)
    with caplog.at_level(logging.ERROR, "freestep"):
        beat(driver, first, first, second, second)
    assert len(caplog.records) == 2
    assert "service on the host there already, and this one runs on here" in caplog.text
    assert (first.live_peers, second.live_peers) == (1, 1)


def test_a_host_is_told_from_its_copy() -> None:
    name, boot = host_identity().split()
    assert name and len(boot) >= 12
    assert host_identity() == host_identity()


@pytest.mark.slow
def test_a_service_does_not_start_at_the_url_of_another_host(driver: Driver, tmp_path: Path) -> None:
    over = threading.Event()

    async def live() -> None:
        store = await Store.connect(driver.url)
        node = Node(URL, TTL_MS, host="there boot-2")
        while not over.is_set():
            await node.heartbeat(store)
            await asyncio.sleep(0.01)
        await store.close()

    other = threading.Thread(target=lambda: asyncio.run(live()))
    other.start()
    try:
        flags = ["--port", "0", "--data-dir", str(tmp_path / "data")]
        done = forked.freestep("serve", *flags, "--redis-url", driver.url, "--advertise-url", URL)
    finally:
        over.set()
        other.join()
    # It has logged why it took its time.
    *_, log, complaint = done.stderr.splitlines()
    assert "waiting to see whether that is live" in log
    assert complaint.startswith(
        f"freestep serve: {URL} is the URL of a service on the host there already, and this one"
    )
    assert done.returncode == 1


def test_a_stopwatch_measures_since_when_things_are_so(clock: Clock) -> None:
    watch = Stopwatch(clock)
    assert watch.age("a") == 0.0
    watch.note({"a"})
    clock.now += 2
    watch.note({"a", "b"})
    clock.now += 3
    assert (watch.age("a"), watch.age("b")) == (5.0, 3.0)
    watch.note({"b"})
    assert (watch.age("a"), watch.age("b")) == (0.0, 3.0)
