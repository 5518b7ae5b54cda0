"""Learning rates that fall when a metric stops improving: `torch.optim.lr_scheduler.ReduceLROnPlateau`.

A group's scalars hold what that class does, by its names: `lr`, the learning rate that is left, `best`,
`num_bad_epochs` and `cooldown_counter`. None of them is there before the first report.
"""

from __future__ import annotations

import math
from typing import Any

from freestep.api.schedules import Plateau
from freestep_service.optimizers.method import Scalars

__all__ = ["observe", "remaining"]

_LEAST_CHANGE = 1e-8
"""torch's eps: by no more the learning rate is not changed."""


def remaining(h: Any, scalars: Scalars) -> float:
    """The learning rate that the metrics have left, before warmup; under other schedules the group's own."""
    return float(scalars.get("lr", h.lr))


def observe(h: Any, scalars: Scalars, name: str, value: float) -> Scalars:
    """A group's scalars after a report."""
    schedule = h.schedule
    if not isinstance(schedule, Plateau) or schedule.metric != name:
        return scalars
    lr, best = remaining(h, scalars), scalars.get("best", math.inf if schedule.mode == "min" else -math.inf)
    bad, cooldown = scalars.get("num_bad_epochs", 0), scalars.get("cooldown_counter", 0)
    if _is_better(schedule, value, best):
        best, bad = value, 0
    else:
        bad += 1
    if cooldown:
        cooldown, bad = cooldown - 1, 0
    if bad > schedule.patience:
        reduced = max(lr * schedule.factor, schedule.min_lr)
        lr = reduced if lr - reduced > _LEAST_CHANGE else lr
        cooldown, bad = schedule.cooldown, 0
    return {**scalars, "lr": lr, "best": best, "num_bad_epochs": bad, "cooldown_counter": cooldown}


def _is_better(schedule: Plateau, value: float, best: float) -> bool:
    sign = 1 if schedule.mode == "max" else -1
    if schedule.threshold_mode == "rel":
        return sign * value > sign * best * (1 + sign * schedule.threshold)
    return sign * value > sign * best + schedule.threshold
