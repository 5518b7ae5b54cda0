"""Schedule-Free over a base optimizer, and generalized primal averaging, which differ in the weights of the average.

For a base that moves z by d, with y, z and x as in `schedule_free`,

    y_t = (1 - β) z_t + β x_t        z_{t+1} = z_t - d        x_{t+1} = (1 - c) x_t + c z_{t+1}

become, without x,

    y <- (1 - c) y + c z + (β (1 - c) - 1) d        z <- z - d

Schedule-Free has c = w_k / Σ w, and γ λ y as a part of d where it decays weights at y, before the base sees z. That is
the `schedulefree` package's ScheduleFreeWrapper. Generalized primal averaging (arXiv 2512.17131) has β = μ_y and
c = 1 - μ_x, over an AdamW or SGD that takes the gradient at y and decays z.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from freestep.api.bases import BaseSGD
from freestep.api.hyperparameters import GPASGD, GPAAdamW, ScheduleFreeWrapper
from freestep_service.optimizers.kernels.compiled import inlined
from freestep_service.optimizers.method import Base, Conditions, Method, Scalars
from freestep_service.optimizers.methods.averages import INITIAL, averaged, interpolation
from freestep_service.optimizers.methods.bases import SGD, base_of
from freestep_service.optimizers.methods.moments import ADAMW
from freestep_service.optimizers.methods.plateau import observe, remaining
from freestep_service.optimizers.methods.schedules import scheduled, warmup

__all__ = ["GPA_ADAMW", "GPA_SGD", "wrapper_of"]


class _Coefficients(NamedTuple):
    z_share: float
    """c, where β stays: what of z - y is added to y."""
    y_share: float
    """β (1 - c) - 1: what y moves by along d."""
    z_pull: float
    """What of z - y is taken off z, where something is."""
    pulls: bool
    decay: float
    """γ λ: what of y is a part of d."""
    base: Any


@cache
def _over(base: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule of averaging over a base's rule: (g, y, z, *the base's state, coefficients)."""
    base = inlined(base)

    def rule(g: Tensor, y: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        s = rest[-1]
        decayed = s.decay * y
        moved = base(g, z - decayed, *rest[:-1], s.base)
        d = decayed + moved[0]
        following = y + s.z_share * (z - y) + s.y_share * d
        z = z - s.z_pull * (z - y) if s.pulls else z
        return (following, z - d, *moved[1:])

    rule.__qualname__ = f"{_over.__qualname__}.{base.__qualname__}"
    return rule


def wrapper_of(h: ScheduleFreeWrapper) -> Method:
    """The method for a base."""
    return _wrapper(base_of(h.base))


@cache
def _wrapper(base: Base) -> Method:
    def advance(h: ScheduleFreeWrapper, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
        lr = h.base.lr * warmup(scalars["k"], h.warmup_steps)
        average = averaged(h, scalars, lr, taken)
        own, coefficients = base.advance(h.base, lr, scalars, average.taken)
        decay = average.taken.rate(lr) * h.weight_decay_at_y
        return {**average.scalars, **own}, _Coefficients(
            average.z_share, average.y_share, average.z_pull, average.z_pull != 0, decay, coefficients
        )

    directed = base.direction
    return Method(
        ("y", "z", *base.buffers),
        {**INITIAL, **base.initial},
        advance,
        _over(base.rule),
        interpolation,
        None if directed is None else lambda h: directed(h.base),
    )


def _gpa(base: Base, its: Callable[[Any], Any]) -> Method:
    """Over a base, whose own hyperparameters `its` finds in the method's."""

    def advance(h: GPAAdamW | GPASGD, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
        lr = scheduled(remaining(h, scalars), h.schedule, scalars["k"])
        _, coefficients = base.advance(its(h), lr, scalars, taken)
        return {**scalars, "k": scalars["k"] + 1}, _Coefficients(
            1 - h.mu_x, h.mu_y * h.mu_x - 1, 0.0, False, 0.0, coefficients
        )

    return Method(
        ("y", "z", *base.buffers), {"k": 0}, advance, _over(base.rule), lambda h, _: float(h.mu_y), observe=observe
    )


GPA_ADAMW = _gpa(ADAMW, lambda h: h)
GPA_SGD = _gpa(SGD, lambda h: BaseSGD(weight_decay=h.weight_decay))
