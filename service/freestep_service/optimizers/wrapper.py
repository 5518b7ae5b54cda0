"""Schedule-Free over a base optimizer, and generalized primal averaging, which differ in the weights of the average.

For a base that moves z by d, with y, z and x as in `schedule_free`,

    y_t = (1 - β) z_t + β x_t        z_{t+1} = z_t - d        x_{t+1} = (1 - c) x_t + c z_{t+1}

become, without x,

    y <- (1 - c) y + c z + (β (1 - c) - 1) d        z <- z - d

Schedule-Free has c = w_k / Σ w, and γ λ y as a part of d where it decays weights at y, before the base sees z. That is
the `schedulefree` package's ScheduleFreeWrapper. Generalized primal averaging (arXiv 2512.17131) has β = μ_y and
c = 1 - μ_x, over an AdamW that takes the gradient at y and decays z.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from freestep.hyperparameters import GPAAdamW, ScheduleFreeWrapper
from freestep_service.optimizers.averages import INITIAL, averaged, interpolation
from freestep_service.optimizers.bases import base_of
from freestep_service.optimizers.compiled import inlined
from freestep_service.optimizers.method import Base, Conditions, Method, Scalars
from freestep_service.optimizers.moments import ADAMW
from freestep_service.optimizers.schedules import scheduled

__all__ = ["GPA_ADAMW", "wrapper_of"]


class _Coefficients(NamedTuple):
    z_share: float
    """c, where β stays: what of z - y is added to y."""
    y_share: float
    """β (1 - c) - 1: what y moves by along d."""
    z_pull: float
    """What of z - y is taken off z: 0, where the staleness that is expected stays."""
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
        return (y + s.z_share * (z - y) + s.y_share * d, z - s.z_pull * (z - y) - d, *moved[1:])

    rule.__qualname__ = f"{_over.__qualname__}.{base.__qualname__}"
    return rule


def wrapper_of(h: ScheduleFreeWrapper) -> Method:
    """The method for a base."""
    return _wrapper(base_of(h.base))


@cache
def _wrapper(base: Base) -> Method:
    def advance(h: ScheduleFreeWrapper, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
        average = averaged(h, scalars, h.base.lr, taken)
        own, coefficients = base.advance(h.base, h.base.lr, scalars, taken._replace(damping=average.damping))
        decay = h.base.lr * average.damping * h.weight_decay_at_y
        return {**average.scalars, **own}, _Coefficients(
            average.z_share, average.y_share, average.z_pull, decay, coefficients
        )

    return Method(("y", "z", *base.buffers), {**INITIAL, **base.initial}, advance, _over(base.rule), interpolation)


def _advance_gpa(h: GPAAdamW, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
    lr = scheduled(h.lr, h.schedule, scalars["k"])
    _, coefficients = ADAMW.advance(h, lr, scalars, taken)
    return {"k": scalars["k"] + 1}, _Coefficients(1 - h.mu_x, h.mu_y * h.mu_x - 1, 0.0, 0.0, coefficients)


GPA_ADAMW = Method(("y", "z", *ADAMW.buffers), {"k": 0}, _advance_gpa, _over(ADAMW.rule), lambda h, _: float(h.mu_y))
