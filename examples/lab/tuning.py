"""Learning rates by trial, over a grid whose best is not at its edge; and what several seeds make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import mean, stdev
from typing import Any

__all__ = ["Tuned", "over_seeds", "tune"]

Trial = list[dict[str, Any]]
"""What runs with one learning rate came to, by seed: figures by their names."""

_MOST_BEYOND = 8
"""Learning rates that a grid may grow by on each side."""


@dataclass(frozen=True)
class Tuned:
    """The trials by learning rate, and which was best by each figure; `at_edge` names those without an inside best."""

    trials: dict[float, Trial]
    best: dict[str, float]
    at_edge: list[str]


def over_seeds(trial: Trial, figure: str) -> tuple[float, float]:
    """The mean of a figure over seeds and its standard deviation; infinite where a run came to nothing."""
    values = [each[figure] for each in trial]
    if not all(value is not None and isfinite(value) for value in values):
        return inf, inf
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def tune(
    run: Callable[[float], Trial], grid: Sequence[float], least: Sequence[str] = (), most: Sequence[str] = ()
) -> Tuned:
    """Tries each learning rate of a geometric grid, and others beyond it until the best is inside.

    least, most: the figures that are to be small, or large, in their mean over seeds; the grid grows until each has
    its best inside, or has grown by eight on that side.
    """
    factor = grid[1] / grid[0]
    trials = {lr: run(lr) for lr in grid}
    grown = {-1: 0, 1: 0}
    while True:
        best = _best(trials, least, most)
        low, high = min(trials), max(trials)
        sides = {-1: low in best.values(), 1: high in best.values()}
        wanted = [side for side, at_edge in sides.items() if at_edge and grown[side] < _MOST_BEYOND]
        if not wanted:
            return Tuned(trials, best, [name for name, lr in best.items() if lr in (low, high)])
        for side in wanted:
            lr = high * factor if side > 0 else low / factor
            trials[lr] = run(lr)
            grown[side] += 1


def _best(trials: Mapping[float, Trial], least: Sequence[str], most: Sequence[str]) -> dict[str, float]:
    """The learning rate that is best by each figure."""

    def cost(lr: float, figure: str) -> float:
        average, _ = over_seeds(trials[lr], figure)
        return -average if figure in most and isfinite(average) else average

    return {figure: min(sorted(trials), key=lambda lr: cost(lr, figure)) for figure in (*least, *most)}
