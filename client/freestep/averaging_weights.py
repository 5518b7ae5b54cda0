"""The sums behind Schedule-Free's averaging weights, which the `schedulefree` package keeps in `param_groups`."""

from __future__ import annotations

import torch

from freestep.api.hyperparameters import RAdamScheduleFree, ScheduleFree, ScheduleFreeWrapper
from freestep.api.schedule_free import AdamWScheduleFree, SGDScheduleFree

__all__ = ["AveragingWeights"]

_CHUNK = 1024 * 1024
"""Steps whose weights are summed up at a time."""


class AveragingWeights:
    """`lr_max` and `weight_sum` of one param group after any number of steps.

    They follow from the hyperparameters: the weight of a step is that of its learning rate before any correction for
    staleness. So they are exact for a run that has had these hyperparameters from its first step.
    """

    def __init__(self, hyperparameters: ScheduleFree) -> None:
        self._hyperparameters = hyperparameters
        self._restart()

    def _restart(self) -> None:
        self._steps, self._lr_max, self._weight_sum = 0, -1.0, 0.0

    def after(self, steps: int) -> tuple[float, float]:
        """(lr_max, weight_sum) after so many steps; before the first, (-1, 0) as in the package."""
        if steps < self._steps:
            self._restart()
        h = self._hyperparameters
        while self._steps < steps:
            k = self._steps
            self._lr_max = max(_learning_rate(h, k), self._lr_max)
            # A run that is joined may have taken millions of steps at one rate.
            last = steps if _is_constant_from(h, k) else k + 1
            self._weight_sum += self._lr_max**h.weight_lr_power * _sum_of_powers(k + 1, last, h.r)
            self._steps = last
        return self._lr_max, self._weight_sum


def _learning_rate(h: ScheduleFree, k: int) -> float:
    """That of step k, counted from 0, as `freestep.api.schedule_free` defines it."""
    if isinstance(h, RAdamScheduleFree):
        return h.lr * _rectification(h, k + 1)
    assert isinstance(h, SGDScheduleFree | AdamWScheduleFree | ScheduleFreeWrapper)
    lr = h.base.lr if isinstance(h, ScheduleFreeWrapper) else h.lr
    return lr * ((k + 1) / h.warmup_steps) if k < h.warmup_steps else lr


def _is_constant_from(h: ScheduleFree, k: int) -> bool:
    if isinstance(h, RAdamScheduleFree):
        # It rises to 1, which it comes to in doubles.
        return _rectification(h, k + 1) == 1
    return k + 1 >= h.warmup_steps  # type: ignore[attr-defined, no-any-return]


def _sum_of_powers(first: int, last: int, r: float) -> float:
    """The sum of i^r for all integers i from `first` to `last`."""
    if r == 0:
        return last - first + 1
    if first == last:
        return float(first**r)
    total = 0.0
    for begin in range(first, last + 1, _CHUNK):
        end = min(begin + _CHUNK, last + 1)
        total += float(torch.arange(begin, end, dtype=torch.float64, device="cpu").pow_(r).sum())
    return total


def _rectification(h: RAdamScheduleFree, t: int) -> float:
    """That of RAdam's step t, counted from 1: arXiv 1908.03265, section 4.1."""
    _, beta2 = h.betas
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length > 4:
        return float(((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5)
    return 0.0 if h.silent_sgd_phase else 1.0
