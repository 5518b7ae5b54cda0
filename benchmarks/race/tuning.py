"""Each method's learning rate, by the same rule for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite

__all__ = ["best_rate", "tune"]


def tune(loss: Callable[[float], float], grid: Sequence[float]) -> dict[float, float]:
    """The losses that rates of even factors come to; where the best is at an edge, one rate beyond it is tried too.

    loss: the loss at the end of a race with a rate; infinite or NaN where it diverged.
    """
    found = {rate: loss(rate) for rate in grid}
    factor, best = grid[1] / grid[0], best_rate(found)
    if best == grid[-1]:
        found[best * factor] = loss(best * factor)
    elif best == grid[0]:
        found[best / factor] = loss(best / factor)
    return dict(sorted(found.items()))


def best_rate(found: Mapping[float, float]) -> float:
    """The rate with the least loss; of several, the smallest."""
    return min(sorted(found), key=lambda rate: found[rate] if isfinite(found[rate]) else inf)
