"""Averages of a method's iterates, which keep x beside y: the mean (Polyak), or an exponential moving average.

    x <- x + share · (y - x)        share = 1 up to the first average, then 1/n or 1 - decay

That is `torch.optim.swa_utils.AveragedModel`, updated after every step from `start_step` on.
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
    """The weight of the y that step k makes."""
    start = 0 if averaging.name == "none" else averaging.start_step
    if k <= start:
        return 1.0
    return 1 - averaging.decay if isinstance(averaging, Ema) else 1 / (k - start + 1)


def averaged(method: Method) -> Method:
    """A method that keeps one point, y, with its average x beside it."""

    def advance(h: Any, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
        following, coefficients = method.advance(h, scalars, taken)
        return following, _Coefficients(_share(h.averaging, scalars["k"]), coefficients)

    first, *others = method.buffers
    rule = _beside(method.rule)
    return Method((first, "x", *others), method.initial, advance, rule, observe=method.observe)


def _beside(method: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule (g, y, x, *the method's other state, coefficients)."""
    method = inlined(method)

    def rule(g: Tensor, y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        s = rest[-1]
        moved = method(g, y, *rest[:-1], s.method)
        return (moved[0], x + s.share * (moved[0] - x), *moved[1:])

    rule.__qualname__ = f"{_beside.__qualname__}.{method.__module__}.{method.__qualname__}"
    return rule
