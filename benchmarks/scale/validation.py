"""The simulation beside what was measured: costs are fitted on some points, and throughput is predicted at all others.

What is fitted is CPU, of the points with 1 and 16 workers, 1 and 4 shards, of the smallest and the largest model. No
throughput is: what pushes wait for follows from the simulation, which shares the machine's cores out among the threads
of generator, services and Redis. If these want more of the cores than other programs left them, which is measured too,
they do as much less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from benchmarks.scale.measured import Point
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Costs, Setup
from benchmarks.scale.simulation import simulate
from freestep_service.settings import Settings

__all__ = ["ALONE", "BUSY", "WITHIN", "Compared", "compare", "fit", "is_fitted", "setup_of"]

ALONE, BUSY = 1, 16
"""Workers of the points that costs are fitted on: of one, threads are idle before each thing they do."""
WITHIN = 0.15
"""How far a predicted throughput may be from the measured one."""

_BYTES = 8
"""A parameter, both ways."""
_LOOP_USES, _REDIS_USES, _SENDER_USES = 5, 2, 4
"""How often a push is at each thread."""
_PUSHES = 250


def _threads(shards: int) -> dict[str, int]:
    return {"loop": shards, "writer": shards, "Redis": 1, "sender": 1}


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
    is_fitted: bool

    @property
    def error(self) -> float:
        """Relative."""
        return self.simulated / self.measured - 1

    @property
    def is_within(self) -> bool:
        return abs(self.error) <= WITHIN


def is_fitted(point: Point, points: Sequence[Point]) -> bool:
    """Whether costs are fitted on a point."""
    shards, sizes = {each.shards for each in points}, {each.parameters for each in points}
    ends = point.shards in (min(shards), max(shards)) and point.parameters in (min(sizes), max(sizes))
    return ends and point.workers in (ALONE, BUSY)


def fit(points: Sequence[Point]) -> dict[int, Costs]:
    """The costs on the measuring machine, by the number of shards."""
    busy = [point for point in points if is_fitted(point, points) and point.workers == BUSY]
    alone = [point for point in points if is_fitted(point, points) and point.workers == ALONE]
    *loops, one_byte, several_byte = _solved(
        [(*_by_path(p.shards), *_by_path(p.shards, _BYTES * p.parameters), p.loop_cpu) for p in busy]
    )
    *sender_push, sender_byte = _solved([(*_by_path(p.shards), _BYTES * p.parameters, p.generator_cpu) for p in busy])
    (update,) = _solved([(p.parameters, p.update_cpu) for p in busy if not _is_inline(p)])
    redis_push = _solved([(*_by_path(p.shards), p.redis_cpu) for p in busy])

    def wakes(cost: str, uses: float) -> float:
        """What a thread takes more each time that it was idle, of the smallest model."""
        least = min(p.parameters for p in points)
        more = [
            (getattr(one, cost) - getattr(many, cost)) / (one.shards if cost == "loop_cpu" else 1)
            for one in alone
            for many in busy
            if (one.shards, one.parameters) == (many.shards, many.parameters) and one.parameters == least
        ]
        return max(0.0, median(more) / uses) if more else 0.0

    return {
        shards: Costs(
            loop_push=loops[shards > 1],
            loop_byte=several_byte if shards > 1 else one_byte,
            update_parameter=update,
            redis_push=redis_push[shards > 1] * shards,
            sender_push=sender_push[shards > 1] * shards,
            sender_byte=sender_byte,
            loop_wake=wakes("loop_cpu", _LOOP_USES),
            redis_wake=wakes("redis_cpu", _REDIS_USES),
            sender_wake=wakes("generator_cpu", _SENDER_USES),
        )
        for shards in sorted({point.shards for point in points})
    }


def _is_inline(point: Point) -> bool:
    """Whether its shards are so small that the event loop's thread updates them: then that is among its CPU."""
    return point.parameters / point.shards <= Settings.model_fields["inline_elements"].default


def _by_path(shards: int, amount: int | None = None) -> tuple[int, int]:
    """The parts of a push, or another amount: a run of one shard goes another way than one of several, with costs of
    its own."""
    each = shards if amount is None else amount
    return (each, 0) if shards == 1 else (0, each)


def _solved(rows: Sequence[tuple[float, ...]]) -> list[float]:
    """The factors of all but the last column whose sums are least far, relatively, from the last; none is negative."""
    table = np.array(rows, dtype=float)
    weights = 1 / np.maximum(np.abs(table[:, -1]), 1e-6)
    left, right = table[:, :-1] * weights[:, None], table[:, -1] * weights
    found, *_ = np.linalg.lstsq(left, right, rcond=None)
    return [max(0.0, float(each)) for each in found]


def setup_of(point: Point, costs: Costs, cores: float) -> Setup:
    """A measured point as a simulation."""
    return Setup(
        point.parameters,
        point.workers,
        replace(costs, update_parameter=0.0) if _is_inline(point) else costs,
        shards=point.shards,
        aggregation={"policy": "async"},
        durability="none",
        cores=cores,
    )


def compare(points: Sequence[Point], cores: float, desk: Desk, waiting_s: float = 0.0) -> list[Compared]:
    """Every point beside its simulation. waiting_s: see `store_costs.waiting_s`."""
    costs: Mapping[int, Costs] = fit(points)
    found = []
    for point in points:
        waiting = waiting_s if point.shards > 1 else 0.0
        setup = setup_of(point, replace(costs[point.shards], redis_waiting=waiting), cores)
        outcome = simulate(setup, desk, _PUSHES, warmup=1.2 * point.workers)
        desk.clear()
        wanted = sum(outcome.use[name] * count for name, count in _threads(point.shards).items())
        left = min(1.0, (cores - point.other_cores) / wanted)
        found.append(
            Compared(
                point.shards,
                point.parameters,
                point.workers,
                point.pushes_per_s,
                outcome.pushes_per_s * left,
                point.staleness,
                outcome.staleness,
                is_fitted(point, points),
            )
        )
    return found
