"""The simulation beside what was measured: throughput is predicted at all points, with costs of the CPU of a few.

What pushes wait for follows from the simulation, which shares the machine's cores out among the threads of generator,
services and Redis. If these want more of the cores than is to be had, they do as much less: what other programs took is
measured, and what processes get of all cores that hand pushes on to each other as those of several shards do
(`handed_on`). One shard's have cores to spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scale.fitting import is_fitted, simulated
from benchmarks.scale.measured import Point
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Costs

__all__ = ["LEAST_WITHIN", "WITHIN", "Compared", "compare", "holds"]

WITHIN = 0.15
"""How far a predicted throughput may be from the measured one."""
LEAST_WITHIN = 0.9
"""The share of the points without fitted costs of which it is to be no farther."""


@dataclass(frozen=True)
class Compared:
    """Pushes a second of a point, measured and simulated. is_fitted: whether costs were fitted on it."""

    shards: int
    parameters: int
    workers: int
    measured: float
    simulated: float
    measured_staleness: float
    simulated_staleness: float
    measured_cores: float
    simulated_cores: float
    is_fitted: bool

    @property
    def error(self) -> float:
        """Relative."""
        return self.simulated / self.measured - 1

    @property
    def is_within(self) -> bool:
        return abs(self.error) <= WITHIN


def compare(
    points: Sequence[Point], costs: Mapping[int, Costs], cores: Mapping[int, float], machine_cores: int, desk: Desk
) -> list[Compared]:
    """Every point beside its simulation. costs: by the number of shards; cores: of several, see `handed_on`."""
    found = []
    for point in points:
        outcome = simulated(point, costs[point.shards], machine_cores, desk)
        wanted = point.shards * outcome.use["loop"] + outcome.use["Redis"] + outcome.use["sender"]
        left = min(1.0, (cores.get(point.shards, machine_cores) - point.other_cores) / wanted)
        found.append(
            Compared(
                point.shards,
                point.parameters,
                point.workers,
                point.pushes_per_s,
                outcome.pushes_per_s * left,
                point.staleness,
                outcome.staleness,
                point.busy_cores,
                wanted * left,
                is_fitted(point),
            )
        )
    return found


def holds(compared: Sequence[Mapping[str, Any]]) -> bool:
    """Whether enough of the points without fitted costs are predicted well enough, as JSON has them."""
    judged = [row["is_within"] for row in compared if not row["is_fitted"]]
    return sum(judged) >= LEAST_WITHIN * len(judged)
