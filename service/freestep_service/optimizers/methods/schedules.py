"""Learning rates by the step: functions of `k`, which counts steps from 0. `freestep.schedules` says what each is.

What metrics make of a learning rate is `plateau`'s.
"""

from __future__ import annotations

import math

from freestep.api import schedules
from freestep.api.schedules import Schedule

__all__ = ["scheduled", "warmup"]


def warmup(k: float, warmup_steps: int) -> float:
    """What a linear warmup makes of the learning rate."""
    return (k + 1) / warmup_steps if k < warmup_steps else 1.0


def scheduled(lr: float, schedule: Schedule, k: float) -> float:
    """The learning rate of step k."""
    if k < schedule.warmup_steps:
        return lr * warmup(k, schedule.warmup_steps)
    return lr * _factor(schedule, k - schedule.warmup_steps)


def _factor(schedule: Schedule, k: float) -> float:
    """What a schedule makes of the learning rate k steps after the warmup."""
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
    """From 1 to `end` as `share` goes from 1 to 0."""
    return end + (1 - end) * share


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _progress(schedule: schedules.Linear | schedules.Cosine, k: float) -> float:
    """How far the way to the end has been gone, in [0, 1]."""
    return min(k / (schedule.total_steps - schedule.warmup_steps), 1.0)


def _cycle(schedule: schedules.CosineRestarts, k: float) -> float:
    """How far the cycle of step k has gone, in [0, 1)."""
    length, growth = schedule.cycle_steps, schedule.cycle_growth
    if growth == 1:
        return k % length / length
    while k >= length:
        k -= length
        length *= growth
    return k / length
