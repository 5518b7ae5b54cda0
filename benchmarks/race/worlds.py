"""The worlds that methods race in: how fast workers are, which are killed and when, and what is between them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import exp, log

from benchmarks.goodput.kills import Kill, schedule

__all__ = ["WORLDS", "World"]


@dataclass(frozen=True)
class World:
    """What differs from equal workers on one host.

    slow: times that the last worker takes for a gradient. drawn: the most that a worker takes, drawn anew each second.
    kill_mean: mean seconds between kills of workers, None for no kills. is_linked: whether each worker, and the
    service, is a host of its own. device: of the task's seconds for a gradient, the share that this world's take.
    seconds: how long a run lasts. seeds: how many of the plan's it is raced with.
    """

    name: str
    says: str
    slow: float = 1.0
    drawn: float = 1.0
    kill_mean: float | None = None
    is_linked: bool = False
    device: float = 1.0
    seconds: float = 8.0
    seeds: int = 1

    def slowness(self, seed: int, worker: int, workers: int, at: float) -> float:
        """Times that a worker takes for a gradient that it begins `at` seconds after the start."""
        if self.drawn > 1.0:
            chance = random.Random(f"{seed}/{worker}/{int(at)}")
            return exp(chance.uniform(0.0, log(self.drawn)))
        return self.slow if worker == workers - 1 else 1.0

    def kills(self, seed: int, seconds: float, workers: int) -> list[Kill]:
        """The kills of a run, the same for all methods."""
        if self.kill_mean is None:
            return []
        return schedule(seed, self.kill_mean, seconds, workers, spares_service=True)


WORLDS = {
    world.name: world
    for world in (
        World("equal", "equal workers", seeds=3),
        World("slow-2", "one of four 2 times slower", slow=2.0),
        World("slow-6", "one of four 6 times slower", slow=6.0, seeds=3),
        World("slow-20", "one of four 20 times slower", slow=20.0),
        World("drawn", "1 to 6 times slower, drawn each second", drawn=6.0, seeds=3),
        World("kills", "a kill every 15 s", kill_mean=15.0, seconds=30.0, seeds=3),
        World("link", "100 Mbit/s, 50 ms", is_linked=True),
        World("fast", "equal workers, a tenth of the time", device=0.1),
    )
}
