"""The costs on the measuring machine, fitted on the CPU of a few points.

Of each thread's CPU there is a row for each point, and the costs are those that leave the rows the least relative
errors (least squares, none negative). How often a push wakes a thread, and how many others wait meanwhile, follows from
the costs, so a simulation of each point counts both with the costs that were found before. What each that waits costs
is the difference between points of many workers and of fewer.

A run of one shard goes another way than one of several, with costs of its own. Of several, a part of a push costs an
event loop more the more there are: its messages have the parts of all, and processes that take turns on the same cores
find their caches cold. So each number of shards has its own cost of a push.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from benchmarks.scale.measured import ALONE, BUSY, SHARDS, SIZES, Point
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Costs, Setup
from benchmarks.scale.simulation import simulate
from freestep_service.settings import Settings
from freestep_service.web.head import Bounds
from freestep_service.web.responses import SHORT

__all__ = ["fit", "is_fitted", "least_squares", "simulated"]

Row = tuple[dict[str, float], float]
"""What a point has of each cost, by its name, and the seconds that they come to."""

_BYTES = 8
"""A parameter, both ways."""
_PUSHES = 250
_TIMES = 3
"""How often points are simulated with the costs that were found, and costs found with what is counted then."""


def is_fitted(point: Point) -> bool:
    """Whether costs are fitted on a point."""
    if point.shards not in SHARDS or point.parameters not in SIZES:
        return True
    ends = point.shards in (min(SHARDS), max(SHARDS)) and point.parameters in (min(SIZES), max(SIZES))
    return ends and point.workers in (ALONE, BUSY)


def simulated(point: Point, costs: Costs, cores: int, desk: Desk) -> Outcome:
    """What the simulation of a point comes to, on so many cores."""
    setup = Setup(
        point.parameters,
        point.workers,
        costs,
        shards=point.shards,
        aggregation={"policy": "async"},
        durability="none",
        is_inline=_is_inline(point),
        cores=cores,
    )
    outcome = simulate(setup, desk, _PUSHES, warmup=1.2 * point.workers)
    desk.clear()
    return outcome


def fit(points: Sequence[Point], cores: int, desk: Desk) -> dict[int, Costs]:
    """The costs by the number of shards."""
    fitted = [point for point in points if is_fitted(point)]
    shards = sorted({point.shards for point in points})
    costs = _found(fitted, [Outcome() for _ in fitted], shards)
    for _ in range(_TIMES):
        outcomes = [simulated(point, costs[point.shards], cores, desk) for point in fitted]
        costs = _found(fitted, outcomes, shards)
    return costs


def _found(fitted: Sequence[Point], outcomes: Sequence[Outcome], shards: Sequence[int]) -> dict[int, Costs]:
    both = list(zip(fitted, outcomes, strict=True))
    update = least_squares([({"update": p.parameters}, p.update_cpu) for p in fitted if not _is_inline(p)])["update"]
    names = ("loop_cpu", "redis_cpu", "generator_cpu")
    loop_waiting, redis_waiting, sender_waiting = (_each_waiting(fitted, name) for name in names)
    loop = least_squares([_loop_row(*each, loop_waiting, update) for each in both])
    redis = least_squares([_redis_row(*each, redis_waiting) for each in both])
    sender = least_squares([_sender_row(*each, sender_waiting) for each in both])

    def costs(count: int) -> Costs:
        is_one = count == 1
        way = "one shard" if is_one else "several"
        return Costs(
            loop_push=loop[f"push, of {count}"],
            loop_byte=loop[f"byte, {way}"],
            loop_hand_over=loop[f"hand over, {way}"],
            loop_long_body=loop[f"long body, {way}"],
            loop_long_answer=loop[f"long answer, {way}"],
            loop_waiting=0.0 if is_one else loop_waiting / count,
            loop_wake=loop[f"wake, {way}"],
            update_parameter=update,
            redis_push=count * redis[f"push, {way}"],
            redis_one_call=redis["push, one call"] if is_one else 0.0,
            redis_byte=redis["byte"],
            redis_waiting=0.0 if is_one else redis_waiting,
            redis_wake=redis["wake"],
            sender_push=count * sender[f"push, {way}"],
            sender_byte=sender["byte"],
            sender_waiting=0.0 if is_one else sender_waiting,
            sender_wake=sender["wake"],
        )

    return {count: costs(count) for count in shards}


def _each_waiting(fitted: Sequence[Point], cost: str) -> float:
    """What a push of several shards costs more for each other that waits: between the most workers and fewer."""
    most = [
        (getattr(many, cost) - getattr(few, cost)) / (many.workers - few.workers)
        for many in fitted
        for few in fitted
        if many.shards > 1 and many.workers > BUSY == few.workers
        if (many.shards, many.parameters) == (few.shards, few.parameters)
    ]
    return max(0.0, median(most)) if most else 0.0


def _loop_row(point: Point, outcome: Outcome, waiting: float, update: float) -> Row:
    shards, is_inline = point.shards, _is_inline(point)
    part = _BYTES / 2 * point.parameters / shards
    row = {
        f"push, of {shards}": float(shards),
        **_by_way("byte", shards, _BYTES * point.parameters),
        **_by_way("wake", shards, outcome.woken["loop"]),
        **_by_way("hand over", shards, 0.0 if is_inline else shards),
        **_by_way("long body", shards, shards if part > Bounds.small_bytes else 0.0),
        **_by_way("long answer", shards, shards if part > SHORT else 0.0),
    }
    # The loop's thread does an inline update, too.
    known = update * point.parameters if is_inline else 0.0
    return row, point.loop_cpu - known - _times_waiting(point, outcome, waiting)


def _redis_row(point: Point, outcome: Outcome, waiting: float) -> Row:
    is_one_call = point.shards == 1 and _is_inline(point)
    row = {
        **({"push, one call": 1.0} if is_one_call else _by_way("push", point.shards, point.shards)),
        "byte": _BYTES * point.parameters,
        "wake": outcome.woken["Redis"],
    }
    return row, point.redis_cpu - _times_waiting(point, outcome, waiting)


def _sender_row(point: Point, outcome: Outcome, waiting: float) -> Row:
    row = {
        **_by_way("push", point.shards, point.shards),
        "byte": _BYTES * point.parameters,
        "wake": outcome.woken["sender"],
    }
    return row, point.generator_cpu - _times_waiting(point, outcome, waiting)


def _times_waiting(point: Point, outcome: Outcome, waiting: float) -> float:
    return outcome.waiting * waiting if point.shards > 1 else 0.0


def _by_way(cost: str, shards: int, amount: float) -> dict[str, float]:
    return {f"{cost}, one shard": amount * (shards == 1), f"{cost}, several": amount * (shards > 1)}


def _is_inline(point: Point) -> bool:
    """Whether its shards are so small that the event loop's thread updates them: then that is among its CPU."""
    return bool(point.parameters / point.shards <= Settings.model_fields["inline_elements"].default)


def least_squares(rows: Sequence[Row]) -> dict[str, float]:
    """The costs by their names; 0 for what cannot be told from those before, and for what would be negative."""
    seconds = np.array([max(each, 1e-6) for _, each in rows])

    def table(names: Sequence[str]) -> np.ndarray:
        rates: np.ndarray = np.array([[row.get(name, 0.0) for name in names] for row, _ in rows]) / seconds[:, None]
        return rates

    found = dict.fromkeys((name for row, _ in rows for name in row), 0.0)
    names = list[str]()
    for name in found:
        if np.linalg.matrix_rank(table([*names, name])) > len(names):
            names.append(name)
    while names:
        costs, *_ = np.linalg.lstsq(table(names), np.ones(len(rows)), rcond=None)
        least = int(np.argmin(costs))
        if costs[least] >= 0:
            return found | dict(zip(names, map(float, costs), strict=True))
        del names[least]
    return found
