"""The simulation beside what was measured: throughput is predicted at all points, with costs of a few.

What pushes wait for follows from the simulation, which shares the machine's cores out among the threads of generator,
services and Redis. It has them busy whenever there is something to do. Real ones are not: a thread that is woken comes
late, and a core idles while threads wait for the other. How much of what is simulated they do is measured at the points
that costs are fitted on, apart for each number of shards, and for one worker and several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.scale.fitting import is_fitted, simulated
from benchmarks.scale.measured import ALONE, Point
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Costs

__all__ = ["LEAST_WITHIN", "WITHIN", "Busy", "Compared", "compare", "holds"]

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


@dataclass(frozen=True)
class Busy:
    """The share of what threads are simulated to do that they do, of a number of shards and one worker or several."""

    shards: int
    alone: bool
    share: float


def compare(
    points: Sequence[Point], costs: Mapping[int, Costs], cores: int, desk: Desk
) -> tuple[list[Compared], list[Busy]]:
    """Every point beside its simulation on so many cores, and how busy threads were. costs: by the number of shards."""
    outcomes = [simulated(point, costs[point.shards], cores, desk) for point in points]
    wanted = [
        p.shards * each.use["loop"] + each.use["Redis"] + each.use["sender"]
        for p, each in zip(points, outcomes, strict=True)
    ]
    by_kind: defaultdict[tuple[int, bool], list[float]] = defaultdict(list)
    for point, simulated_cores in zip(points, wanted, strict=True):
        if is_fitted(point):
            by_kind[_kind(point)].append(point.busy_cores / simulated_cores)
    busy = {kind: median(shares) for kind, shares in sorted(by_kind.items())}
    found = []
    for point, outcome, simulated_cores in zip(points, outcomes, wanted, strict=True):
        share = busy[_kind(point)]
        found.append(
            Compared(
                point.shards,
                point.parameters,
                point.workers,
                point.pushes_per_s,
                outcome.pushes_per_s * share,
                point.staleness,
                outcome.staleness,
                point.busy_cores,
                simulated_cores * share,
                is_fitted(point),
            )
        )
    return found, [Busy(*kind, share) for kind, share in busy.items()]


def _kind(point: Point) -> tuple[int, bool]:
    return point.shards, point.workers == ALONE


def holds(compared: Sequence[Mapping[str, Any]]) -> bool:
    """Whether enough of the points without fitted costs are predicted well enough, as JSON has them."""
    judged = [row["is_within"] for row in compared if not row["is_fitted"]]
    return bool(sum(judged) >= LEAST_WITHIN * len(judged))
