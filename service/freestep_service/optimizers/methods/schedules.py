"""Learning rates as functions of the step `k`, counted from 0. `freestep.api.schedules` defines each schedule.

`plateau` is the one that depends on metrics.
"""

from __future__ import annotations

import math

from freestep.api import schedules
from freestep.api.schedules import Schedule

__all__ = ["scheduled", "warmup"]


def warmup(k: float, warmup_steps: int) -> float:
    """The factor of a linear warmup on the learning rate, in (0, 1]."""
    return (k + 1) / warmup_steps if k < warmup_steps else 1.0


def scheduled(lr: float, schedule: Schedule, k: float) -> float:
    """The learning rate of step k, from the learning rate `lr` of the hyperparameters."""
    if k < schedule.warmup_steps:
        return lr * warmup(k, schedule.warmup_steps)
    return lr * _factor(schedule, k - schedule.warmup_steps)


def _factor(schedule: Schedule, k: float) -> float:
    """The schedule's factor on the learning rate, k steps after the warmup."""
    match schedule:
        case schedules.Linear():
            return _towards(schedule.end_factor, 1 - _progress(schedule, k))
        case schedules.Cosine():
            return _towards(schedule.end_factor, _half_cosine(_progress(schedule, k)))
        case schedules.CosineRestarts():
            return _towards(schedule.end_factor, _half_cosine(_cycle(schedule, k)))
        case schedules.Step():
            return float(schedule.gamma ** (k // schedule.step_size))
        case schedules.InverseSqrt():
            first = max(schedule.warmup_steps, 1)
            return math.sqrt(first / max(schedule.warmup_steps + k + 1, first))
        case _:
            return 1.0


def _towards(end: float, share: float) -> float:
    """Falls linearly from 1 to `end` while `share` falls from 1 to 0."""
    return end + (1 - end) * share


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _progress(schedule: schedules.Linear | schedules.Cosine, k: float) -> float:
    """The share of the steps after the warmup that have passed, in [0, 1]."""
    return min(k / (schedule.total_steps - schedule.warmup_steps), 1.0)


def _cycle(schedule: schedules.CosineRestarts, k: float) -> float:
    """The share of the current cycle that has passed, in [0, 1)."""
    length, growth = schedule.cycle_steps, schedule.cycle_growth
    if growth == 1:
        return k % length / length
    while k >= length:
        k -= length
        length *= growth
    return k / length
