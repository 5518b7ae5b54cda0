"""What a push costs Redis, by the number of shards and of workers: the scripts of a push, as many as it has.

They are run by `Rules` as the owners of shards would run them, and Redis's own clock says what they took. Nobody
listens to what they publish and each call comes alone, so services cost Redis more; how much more is measured
(`measured`) and added by `costs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from benchmarks.scale.rules import Desk, Rules
from benchmarks.scale.setup import Costs, Setup

__all__ = ["WAITING_SHARDS", "StoreCost", "measure", "over_shards", "waiting_s"]

SHARDS = (1, 2, 4, 16, 64, 256)
WORKERS = (10, 1000, 10_000)
WAITING_SHARDS: dict[int, Sequence[int]] = {4: (16, 256, 1000), 64: (16, 256)}
"""Of so many shards, how many workers wait at most."""
POLICIES: dict[str, dict[str, Any]] = {
    "ringmaster": {"policy": "ringmaster"},
    "sync": {"policy": "sync"},
    "ssp": {"policy": "ssp", "slack": 1_000_000},
}
_CALLS, _LEAST_PUSHES, _MOST_PUSHES = 2000, 3, 300


@dataclass(frozen=True)
class StoreCost:
    """Milliseconds of Redis's main thread, a push."""

    policy: str
    shards: int
    workers: int
    ms: float
    calls: int
    waiting: bool = False
    """Whether all workers have a push that waits for its turn, as of several shards they do."""


def measure(desk: Desk, quick: bool = False) -> list[StoreCost]:
    """Over shards with few workers, and over workers with one shard, by policy."""
    cells = [("ringmaster", shards, WORKERS[0]) for shards in (SHARDS[:3] if quick else SHARDS)]
    cells += [(policy, 1, workers) for policy in POLICIES for workers in (WORKERS[:1] if quick else WORKERS)]
    found = [_measure(desk, *cell) for cell in dict.fromkeys(cells)]
    waiting = [(shards, workers) for shards, numbers in WAITING_SHARDS.items() for workers in numbers]
    return found + [_measure(desk, "ringmaster", *cell, waiting=True) for cell in waiting]


def over_shards(tried: Mapping[int, float], shards: int) -> float:
    """What is between numbers of shards that were tried: a power of the number; beyond them it stays as it is."""
    below = max((each for each in tried if each <= shards), default=min(tried))
    above = min((each for each in tried if each >= shards), default=max(tried))
    if above == below or not tried[below]:
        return tried[below]
    power = log(tried[above] / tried[below]) / log(above / below)
    return tried[below] * float((shards / below) ** power)


def waiting_s(store: Sequence[StoreCost], shards: int) -> float:
    """Seconds that a push of so many shards costs Redis for each other that waits; of one shard, none asks."""
    if shards == 1:
        return 0.0
    slopes: dict[int, float] = {}
    for count in sorted({each.shards for each in store if each.waiting}):
        rows = sorted((each.workers, each.ms) for each in store if each.waiting and each.shards == count)
        (few, less), (many, more) = rows[0], rows[-1]
        slopes[count] = max(1e-9, 1e-3 * (more - less) / (many - few))
    return over_shards(slopes, shards)


def _measure(desk: Desk, policy: str, shards: int, workers: int, *, waiting: bool = False) -> StoreCost:
    setup = Setup(1, workers, Costs(0, 0, 0, 0), aggregation=POLICIES[policy])
    rules = Rules(desk, setup.spec(), shards=shards)
    names = [f"worker-{number}" for number in range(workers)]
    rules.join(names)
    pushes = min(_MOST_PUSHES, max(_LEAST_PUSHES, _CALLS // (2 * shards)))
    if waiting:
        for name in names:
            rules.admit(name, 0)
    before = _main_thread_s(desk)
    for number in range(pushes):
        # First come, first served: whose turn it is has waited the longest, and comes again.
        name = names[number % workers]
        if waiting:
            rules.commit(name)
            rules.admit(name, rules.step)
        elif rules.admit(name, rules.step) is None:
            rules.commit(name)
    spent = _main_thread_s(desk) - before
    desk.clear()
    return StoreCost(policy, shards, workers, 1e3 * spent / pushes, 2 * shards, waiting)


def _main_thread_s(desk: Desk) -> float:
    info = desk.do(desk.store.client.info("cpu"))
    return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])
