"""What units of data sets cost Redis: pushes without them nothing, and pushes with them a fixed number of commands."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from coordination.driven import DrivenRun, Driver
from freestep.api.data import DataSpec
from freestep_service.domain.data_sets import NewDataSet
from harness import store

PUSHES = 4


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """A store of the test's own, whose commands it counts."""
    with store("valkey", tmp_path) as url:
        made = Driver(url)
        yield made
        made.close()


def commands(redis: Redis) -> int:
    """How many commands scripts have given since they were counted last."""
    stats = redis.info("commandstats")
    redis.config_resetstat()
    own = {"cmdstat_evalsha", "cmdstat_eval", "cmdstat_info", "cmdstat_config|resetstat"}
    return sum(each["calls"] for name, each in stats.items() if name not in own)


def cost_of_pushes(run: DrivenRun, units: int) -> float:
    """Commands for a push that names so many units."""
    lease, data = run.grant(), run.coordinator.data
    held: list[int] = []
    if units:
        held = run.do(data.claim(run.owner(), lease.lease, lease.token, "train", PUSHES * units, "")).numbers
    # From here on the server has the scripts.
    run.push(run.claim(lease, uuid.uuid4().hex, run.number("step")))
    commands(run.redis)
    for number in range(PUSHES):
        named = tuple(held[number * units : (number + 1) * units])
        claim = run.claim(lease, uuid.uuid4().hex)
        run.push(replace(claim, units={"train": named} if named else {}))
    return commands(run.redis) / PUSHES


@pytest.mark.parametrize("shards", [1, 3])
def test_only_pushes_with_units_pay_for_them(driver: Driver, shards: int) -> None:
    run = DrivenRun(driver, shards).open()
    without_data = cost_of_pushes(run, 0)
    run.do(run.coordinator.data.create(run.owner(), NewDataSet("train", DataSpec(length=10**9, unit=1))))
    assert cost_of_pushes(run, 0) == without_data
    one, hundred = cost_of_pushes(run, 1), cost_of_pushes(run, 100)
    assert one <= without_data + 4 * (shards + 2)
    assert hundred == one
