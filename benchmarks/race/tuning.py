"""Each method's learning rate, by the same rule and with as many tries for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite, sqrt

__all__ = ["best_rate", "tune"]


def tune(loss: Callable[[float], float], grid: Sequence[float]) -> dict[float, float]:
    """The losses that rates of even factors come to, and one rate more.

    Where the best is at an edge, that is the next rate beyond it; else the one between the best and the better of its
    neighbours. loss: the loss at the end of a race with a rate; infinite or NaN where it diverged.
    """
    found = {rate: loss(rate) for rate in grid}
    more = _two_digits(_next(found, grid))
    found[more] = loss(more)
    return dict(sorted(found.items()))


def _next(found: Mapping[float, float], grid: Sequence[float]) -> float:
    best = best_rate(found)
    at = grid.index(best)
    if at in (0, len(grid) - 1):
        return best**2 / grid[1 if at == 0 else at - 1]
    return sqrt(best * best_rate({rate: found[rate] for rate in (grid[at - 1], grid[at + 1])}))


def _two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")


def best_rate(found: Mapping[float, float]) -> float:
    """The rate with the least loss; of several, the smallest."""
    return min(sorted(found), key=lambda rate: found[rate] if isfinite(found[rate]) else inf)
