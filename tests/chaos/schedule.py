"""What a seed stands for: a system, its run, and the faults that come over it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from chaos.service import BETWEEN, POINTS

__all__ = ["RATES", "Fault", "Schedule", "scheduled"]

_SECONDS = 3.0
"""For which faults begin."""
_POLICIES: list[tuple[dict[str, Any], int]] = [
    ({"policy": "async"}, 1),
    ({"policy": "async", "max_staleness": 1}, 1),
    ({"policy": "buffered", "batch": 2}, 2),
]
"""Policies, and how many pushes are in an update."""
RATES = (0.75, 0.875, 1.0)
"""Learning rates that are set: floats hold them exactly, and none is twice another, nor the sum of two."""
_STORES = ("embedded", "valkey", "appending")
"""Where Redis is: the service's own; another that keeps nothing on disk; one that keeps every command."""


@dataclass(frozen=True)
class Fault:
    """Something that is done at a moment, for a time.

    at_s: after the beginning. where: number of a process of the service, or of a worker. detail: by kind.
    """

    at_s: float
    kind: str
    where: int = 0
    for_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Schedule:
    """A run, its system and its faults; a function of the seed alone."""

    seed: int
    shards: int
    processes: int
    store: str
    durability: str
    policy: dict[str, Any]
    batch: int
    workers: int
    is_inline: bool
    """Whether shards are updated on the event loop, and pushes without units are one call of Redis."""
    faults: tuple[Fault, ...]
    ending: str
    """What is done to the service before the last look at the weights: `none`, or `restart` (in order)."""

    def without(self, faults: set[int]) -> Schedule:
        """The schedule without the faults at some places."""
        return replace(self, faults=tuple(each for index, each in enumerate(self.faults) if index not in faults))


def scheduled(seed: int) -> Schedule:
    """The schedule of a seed. Seeds that follow each other take turns with what systems there are."""
    chance = random.Random(seed)
    is_sharded = seed % 2 == 1
    store = _STORES[1 + seed // 2 % 2] if is_sharded else _STORES[seed // 2 % 3]
    durability = ("journal", "checkpoint")[seed // 2 % 2] if is_sharded or seed % 10 else "none"
    policy, batch = _POLICIES[seed // 4 % 3]
    processes, workers = (2, 3) if is_sharded else (1, 3)
    kinds = ["kill", "stop", "segv", "gil", "point", "point", "point", "worker-kill", "worker-stop", "worker-twin"]
    kinds += ["cut", "delay", "half-close", "disk"]
    if store != "embedded":
        kinds += ["store-cut", "store-delay", "store-kill", "store-stop", "store-stop"]
    kinds += ["store-kill", "store-flush", "store-flush", "store-scripts", "store-clients", "store-back"]
    kinds += ["store-evict", "store-evict"]
    faults = [_fault(chance, chance.choice(kinds), processes, workers) for _ in range(chance.randrange(2, 5))]
    if seed % 4 != 3:
        action = "power" if durability == "journal" else "kill"
        # Most schedules are for the moments between the receipt of a body and its answer.
        point = chance.choice(BETWEEN)
        if action == "power" and chance.random() < 0.5:
            point = "flushing"
        point = f"{point} {chance.randrange(1, 6)} {action}"
        faults.append(Fault(round(chance.uniform(0.1, 1.0), 2), "point", chance.randrange(processes), detail=point))
    if durability != "none":
        # Without checkpoints a change is lost with the weights. Its own chance: else every seed were another schedule.
        changing = random.Random(f"changes {seed}")
        for rate in changing.sample(RATES, changing.randrange(1, 4)):
            at_s = round(changing.uniform(0.1, _SECONDS), 2)
            faults.append(Fault(at_s, "change", changing.randrange(processes), detail=str(rate)))
    faults.sort(key=lambda fault: fault.at_s)
    ending = "restart" if seed % 3 == 0 else "none"
    shards, is_inline = 3 if is_sharded else 1, seed // 4 % 2 == 1
    return Schedule(
        seed, shards, processes, store, durability, policy, batch, workers, is_inline, tuple(faults), ending
    )


def _fault(chance: random.Random, kind: str, processes: int, workers: int) -> Fault:
    count = workers if kind.startswith("worker") else processes
    detail = ""
    if kind == "store-evict":
        detail = str(chance.randrange(1 << 16))
    if kind == "point":
        action = chance.choice(["kill", "kill", "kill", "segv", "stop", "gil"])
        hits = 1 if (point := chance.choice(POINTS)).startswith("writ") else chance.randrange(1, 6)
        detail = f"{point} {hits} {action}"
    return Fault(
        at_s=round(chance.uniform(0.3, _SECONDS), 2),
        kind=kind,
        where=chance.randrange(count),
        # Longer and shorter than leases and ownerships.
        for_s=round(chance.choice([0.2, 0.6, 1.6, 2.4]), 2),
        detail=detail,
    )
