"""When processes are killed, and which: a function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["SERVICE", "Kill", "schedule"]

SERVICE = -1
"""The victim that is no worker."""


@dataclass(frozen=True)
class Kill:
    """A SIGKILL, seconds after the start of a run, of a worker by its number, or of the service."""

    at: float
    victim: int


def schedule(seed: int, mean: float, seconds: float, workers: int, *, spares_service: bool = False) -> list[Kill]:
    """Kills with exponential times between them, `mean` seconds on average, each of any process alike."""
    chance = random.Random(f"{seed}/{mean}")
    kills: list[Kill] = []
    at = chance.expovariate(1 / mean)
    while at < seconds:
        kills.append(Kill(at, chance.randrange(0 if spares_service else SERVICE, workers)))
        at += chance.expovariate(1 / mean)
    return kills
