"""Learning rates that fall when a metric stops improving, as `torch.optim.lr_scheduler.ReduceLROnPlateau` has them.

A param group's scalars are named as that class's attributes: `lr`, the reduced learning rate, `best`, `num_bad_epochs`
and `cooldown_counter`. They are missing until the first report, and `best` as long as no value has been better.
"""

from __future__ import annotations

import math
from typing import Any

from freestep.api.schedules import Plateau
from freestep_service.optimizers.method import Scalars

__all__ = ["observe", "remaining", "retune"]

_MIN_CHANGE = 1e-8
"""torch's eps: smaller changes of the learning rate are not made."""


def remaining(h: Any, scalars: Scalars) -> float:
    """The learning rate after the reductions so far, before warmup; under other schedules, the group's own."""
    return float(scalars.get("lr", h.lr))


def observe(h: Any, scalars: Scalars, name: str, value: float) -> Scalars:
    """A param group's scalars after a report of a metric."""
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
        lr = reduced if lr - reduced > _MIN_CHANGE else lr
        cooldown, bad = schedule.cooldown, 0
    after = {**scalars, "lr": lr, "best": best, "num_bad_epochs": bad, "cooldown_counter": cooldown}
    if not math.isfinite(best):
        # As torch's with a relative threshold from 1 on, by which nothing is better; states have finite numbers only.
        del after["best"]
    return after


def retune(before: Any, after: Any, scalars: Scalars) -> Scalars:
    """A param group's scalars after a change of its hyperparameters: another rate, or schedule, begins anew.

    As where `lr` of a group of torch's is set: its scheduler reduces that from then on.
    """
    forgotten: set[str] = set()
    if after.lr != before.lr:
        forgotten = {"lr"}
    if _followed(after) != _followed(before):
        forgotten = {"lr", "best", "num_bad_epochs", "cooldown_counter"}
    return {name: value for name, value in scalars.items() if name not in forgotten}


def _followed(h: Any) -> tuple[str, ...]:
    """The schedule's name, and the metric that it follows."""
    return h.schedule.name, getattr(h.schedule, "metric", ""), getattr(h.schedule, "mode", "")


def _is_better(schedule: Plateau, value: float, best: float) -> bool:
    sign = 1 if schedule.mode == "max" else -1
    if schedule.threshold_mode == "rel":
        return sign * value > sign * best * (1 + sign * schedule.threshold)
    return sign * value > sign * best + schedule.threshold
