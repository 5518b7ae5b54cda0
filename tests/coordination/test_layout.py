"""Processes on one Redis have one layout: a newer one waits until the older have gone, and then those write nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from coordination.driven import HOUR, DrivenRun, Driver
from freestep_service.coordination import store as store_module
from freestep_service.coordination.condition import faults
from freestep_service.coordination.nodes import NODE_HOSTS_KEY, NODES_KEY, Node
from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.coordination.store import LAYOUT_KEY, Store
from freestep_service.domain.layout import LAYOUT, LayoutInUse, NewerLayout
from freestep_service.domain.records import RunState

LUA = Path(store_module.__file__).parent / "lua"
OF_NO_RUN = {"node_heartbeat", "note_deletion", "quota_settle", "quota_take"}
"""Scripts whose keys are none of a run's."""


@pytest.fixture(autouse=True)
def _nobody(driver: Driver) -> Iterator[None]:
    yield
    driver.redis.delete(NODES_KEY, NODE_HOSTS_KEY, LAYOUT_KEY)


@pytest.fixture
def newer(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store of processes of the next layout."""
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "LAYOUT", LAYOUT + 1)
        made = driver.do(Store.connect(driver.url))
    yield made
    driver.do(made.close())


def joining(sleep: Callable[[float], Awaitable[None]]) -> Node:
    return Node("http://newer:1", HOUR, sleep=sleep)


async def no_sleep(_: float) -> None:
    raise AssertionError("the node waits")


def as_of_0_1_0(driver: Driver, node: Node) -> None:
    """Registers a process as version 0.1.0 does, whose records have no layout."""
    driver.do(node.heartbeat(driver.store))
    record = json.loads(str(driver.redis.hget(NODE_HOSTS_KEY, node.id)))
    assert record.pop("layout") == LAYOUT == 1
    driver.redis.hset(NODE_HOSTS_KEY, node.id, json.dumps(record))
    driver.redis.delete(LAYOUT_KEY)


def test_processes_of_one_layout_note_it(driver: Driver) -> None:
    driver.do(Node("http://a:1", HOUR).heartbeat(driver.store))
    assert driver.redis.get(LAYOUT_KEY) == str(LAYOUT)
    assert key_slot(LAYOUT_KEY.encode()) == key_slot(NODES_KEY.encode())


@pytest.mark.parametrize("is_released", [False, True], ids=["says it", "0.1.0"])
def test_a_newer_layout_is_refused_while_a_process_of_an_older_one_lives(
    driver: Driver, newer: Store, is_released: bool
) -> None:
    older = Node("http://older:1", HOUR)
    if is_released:
        as_of_0_1_0(driver, older)
    else:
        driver.do(older.heartbeat(driver.store))

    async def other_lives(_: float) -> None:
        before = driver.redis.zscore(NODES_KEY, older.id)
        while driver.redis.zscore(NODES_KEY, older.id) == before:
            await older.heartbeat(driver.store)

    with pytest.raises(LayoutInUse, match=r"^http://older:1 is a service of an older version of freestep"):
        driver.do(joining(other_lives).heartbeat(newer))
    assert driver.redis.get(LAYOUT_KEY) == "1"
    assert driver.redis.zrange(NODES_KEY, 0, -1) == driver.redis.hkeys(NODE_HOSTS_KEY) == [older.id]


def test_a_newer_layout_begins_when_the_older_processes_have_gone(
    driver: Driver, newer: Store, caplog: pytest.LogCaptureFixture
) -> None:
    older = Node("http://older:1", HOUR)
    as_of_0_1_0(driver, older)

    async def its_time_runs_out(_: float) -> None:
        driver.redis.zadd(NODES_KEY, {older.id: 1})

    with caplog.at_level(logging.WARNING, "freestep"):
        driver.do(joining(its_time_runs_out).heartbeat(newer))
    assert "http://older:1 was a service of an older version until lately" in caplog.text
    assert driver.redis.get(LAYOUT_KEY) == "2"


def test_an_older_process_that_comes_back_changes_nothing(driver: Driver, newer: Store) -> None:
    older = Node("http://older:1", HOUR, sleep=no_sleep)
    driver.do(older.heartbeat(driver.store))
    driver.do(older.leave(driver.store))
    driver.do(joining(no_sleep).heartbeat(newer))
    before = driver.redis.zrange(NODES_KEY, 0, -1), driver.redis.hgetall(NODE_HOSTS_KEY)
    # One that was stopped for a while, and one that starts.
    for node in (older, Node("http://older:2", HOUR, sleep=no_sleep)):
        with pytest.raises(NewerLayout, match=r"^Redis has layout 2, of a newer version of freestep"):
            driver.do(node.heartbeat(driver.store))
        assert node.newer is not None
    driver.redis.delete("freestep:writable")
    with pytest.raises(NewerLayout):
        driver.do(Store.connect(driver.url))
    assert not driver.redis.exists("freestep:writable")
    assert (driver.redis.zrange(NODES_KEY, 0, -1), driver.redis.hgetall(NODE_HOSTS_KEY)) == before
    assert driver.redis.get(LAYOUT_KEY) == "2"


def test_what_is_no_layout_is_replaced_or_named(driver: Driver) -> None:
    driver.redis.set(LAYOUT_KEY, "words")
    driver.do(driver.do(Store.connect(driver.url)).close())
    driver.do(Node("http://a:1", HOUR).heartbeat(driver.store))
    assert driver.redis.get(LAYOUT_KEY) == str(LAYOUT)
    driver.redis.delete(LAYOUT_KEY)
    driver.redis.lpush(LAYOUT_KEY, "words")
    assert [fault for fault in driver.do(faults(driver.store)) if LAYOUT_KEY in fault]


# Of a run


def test_a_run_says_its_layout(run: DrivenRun) -> None:
    assert run.field("layout") == str(LAYOUT)


@pytest.mark.parametrize(
    "script", sorted({path.stem for path in LUA.glob("[!_]*.lua")} - OF_NO_RUN), ids=lambda name: name
)
def test_no_script_changes_a_run_of_a_newer_layout(driver: Driver, run: DrivenRun, script: str) -> None:
    driver.redis.hset(run.key("run"), "layout", LAYOUT + 1)
    before = run.dump()
    with pytest.raises(NewerLayout, match="Redis has layout 2"):
        driver.do(RunScripts(driver.store, run.name).call(script))
    assert run.dump() == before


def test_a_run_of_a_newer_layout_is_not_read(driver: Driver, run: DrivenRun) -> None:
    driver.redis.hset(run.key("run"), "layout", LAYOUT + 1)
    with pytest.raises(NewerLayout):
        driver.do(run.opening.read())


def test_a_run_of_0_1_0_is_read_and_says_its_layout_once_it_is_opened(run: DrivenRun) -> None:
    run.redis.hdel(run.key("run"), "layout")
    assert run.view().phase == "open"
    run.do(run.opening.gather(run.shards))
    run.reopen(RunState(1, initialized=True))
    assert run.field("layout") == str(LAYOUT)
