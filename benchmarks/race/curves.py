"""What a race's curve says: when it came to a loss, and how far so many gradients brought it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

__all__ = ["Point", "gradients_to", "loss_after", "mean_and_spread", "seconds_to"]

Point = Sequence[float]
"""Seconds since the start, gradients computed until then, loss, accuracy."""


def seconds_to(curve: Sequence[Point], target: float) -> float | None:
    """When the loss was at most the target first, between two looks on a line; None if it never was."""
    return _reached(curve, target, 0)


def gradients_to(curve: Sequence[Point], target: float) -> float | None:
    """How many gradients had been computed then."""
    return _reached(curve, target, 1)


def _reached(curve: Sequence[Point], target: float, of: int) -> float | None:
    before = curve[0]
    for point in curve:
        if point[2] <= target:
            if point is before:
                return point[of]
            share = (before[2] - target) / (before[2] - point[2])
            return before[of] + share * (point[of] - before[of])
        before = point
    return None


def loss_after(curve: Sequence[Point], gradients: float) -> float | None:
    """The loss when so many gradients had been computed, between two looks on a line; None if they never were."""
    before = curve[0]
    for point in curve[1:]:
        if point[1] >= gradients:
            share = (gradients - before[1]) / (point[1] - before[1]) if point[1] > before[1] else 0.0
            return before[2] + share * (point[2] - before[2])
        before = point
    return None


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The mean and the standard deviation, which is 0 for one value."""
    taken = list(values)
    return mean(taken), stdev(taken) if len(taken) > 1 else 0.0
