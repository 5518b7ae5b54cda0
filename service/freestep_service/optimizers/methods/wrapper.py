"""Schedule-Free over a base optimizer, and generalized primal averaging, which differ in their averaging weights.

For a base whose step is d, with y, z and x as in `schedule_free`,

    y_t = (1 - β) z_t + β x_t        z_{t+1} = z_t - d        x_{t+1} = (1 - c) x_t + c z_{t+1}

become, with x eliminated,

    y <- (1 - c) y + c z + (β (1 - c) - 1) d        z <- z - d

Schedule-Free has c = w_k / Σ w. Weight decay at y makes γ λ y a part of d, and the base gets z after it, as in the
`schedulefree` package's ScheduleFreeWrapper. Generalized primal averaging (arXiv 2512.17131) has β = μ_y and
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
from freestep_service.optimizers.methods.plateau import observe, remaining, retune
from freestep_service.optimizers.methods.schedules import scheduled, warmup

__all__ = ["GPA_ADAMW", "GPA_SGD", "wrapper_of"]


class _Coefficients(NamedTuple):
    z_share: float
    """The coefficient of z - y in the change of y: c, where β is constant."""
    y_share: float
    """β (1 - c) - 1: the coefficient of d in the change of y."""
    z_pull: float
    """z decreases by this share of z - y before the step, if `pulls`."""
    pulls: bool
    decay: float
    """γ λ: the coefficient of y in d, for weight decay at y."""
    base: Any


@cache
def _averaged_rule(base: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The rule with averaging over a base's rule: (g, y, z, *the base's state, coefficients) -> the next state."""
    base = inlined(base)

    def rule(g: Tensor, y: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        s = rest[-1]
        decayed = s.decay * y
        base_step = base(g, z - decayed, *rest[:-1], s.base)
        d = decayed + base_step[0]
        next_y = y + s.z_share * (z - y) + s.y_share * d
        z = z - s.z_pull * (z - y) if s.pulls else z
        return (next_y, z - d, *base_step[1:])

    rule.__qualname__ = f"{_averaged_rule.__qualname__}.{base.__qualname__}"
    return rule


def wrapper_of(h: ScheduleFreeWrapper) -> Method:
    """Schedule-Free over the base that the hyperparameters name."""
    return _wrapper(base_of(h.base))


@cache
def _wrapper(base: Base) -> Method:
    def advance(h: ScheduleFreeWrapper, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
        lr = h.base.lr * warmup(scalars["k"], h.warmup_steps)
        average = averaged(h, scalars, lr, conditions)
        changed, coefficients = base.advance(h.base, lr, scalars, average.conditions)
        lr = average.conditions.limited(lr)
        return {**average.scalars, **changed, "scheduled_lr": lr}, _Coefficients(
            average.z_share,
            average.y_share,
            average.z_pull,
            average.z_pull != 0,
            lr * h.weight_decay_at_y,
            coefficients,
        )

    direction = base.direction
    return Method(
        ("y", "z", *base.buffers),
        {**INITIAL, **base.initial},
        advance,
        _averaged_rule(base.rule),
        interpolation,
        None if direction is None else lambda h: direction(h.base),
    )


def _gpa(base: Base, base_hyperparameters: Callable[[Any], Any]) -> Method:
    """Generalized primal averaging over a base. base_hyperparameters: the method's -> the base's."""

    def advance(h: GPAAdamW | GPASGD, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
        lr = scheduled(remaining(h, scalars), h.schedule, scalars["k"])
        _, coefficients = base.advance(base_hyperparameters(h), lr, scalars, conditions)
        return {**scalars, "k": scalars["k"] + 1, "scheduled_lr": conditions.limited(lr)}, _Coefficients(
            1 - h.mu_x, h.mu_y * h.mu_x - 1, 0.0, False, 0.0, coefficients
        )

    return Method(
        ("y", "z", *base.buffers),
        {"k": 0},
        advance,
        _averaged_rule(base.rule),
        lambda h, _: float(h.mu_y),
        observe=observe,
        retune=retune,
    )


GPA_ADAMW = _gpa(ADAMW, lambda h: h)
GPA_SGD = _gpa(SGD, lambda h: BaseSGD(weight_decay=h.weight_decay))
