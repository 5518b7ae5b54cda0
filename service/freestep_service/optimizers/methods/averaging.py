"""Averages of a method's iterates y, kept as x: their mean (Polyak), or an exponential moving average.

    x <- x + share · (y - x)        share = 1 up to step `start_step`, then 1/n for the n-th y, or 1 - decay

It equals `torch.optim.swa_utils.AveragedModel`, updated after every step from `start_step` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from freestep.api.schedules import Averaging, Ema
from freestep_service.optimizers.kernels.compiled import inlined
from freestep_service.optimizers.method import Conditions, Method, Scalars

__all__ = ["averaged"]


class _Coefficients(NamedTuple):
    share: float
    method: Any


def _share(averaging: Averaging, k: float) -> float:
    """The weight in x of the y that step k results in."""
    start = 0 if averaging.name == "none" else averaging.start_step
    if k <= start:
        return 1.0
    return 1 - averaging.decay if isinstance(averaging, Ema) else 1 / (k - start + 1)


def averaged(method: Method) -> Method:
    """The method that keeps, beside the state of one with a single point y, the average x of y."""

    def advance(h: Any, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
        next_scalars, coefficients = method.advance(h, scalars, conditions)
        return next_scalars, _Coefficients(_share(h.averaging, scalars["k"]), coefficients)

    first, *others = method.buffers
    rule = _with_average(method.rule)
    return Method((first, "x", *others), method.initial, advance, rule, observe=method.observe, retune=method.retune)


def _with_average(method: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule (g, y, x, *the method's other state, coefficients) -> the next state."""
    method = inlined(method)

    def rule(g: Tensor, y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        s = rest[-1]
        moved = method(g, y, *rest[:-1], s.method)
        return (moved[0], x + s.share * (moved[0] - x), *moved[1:])

    rule.__qualname__ = f"{_with_average.__qualname__}.{method.__module__}.{method.__qualname__}"
    return rule
