"""DiLoCo's outer optimizer (arXiv 2311.08105): Nesterov momentum over pseudo-gradients; and Delayed Nesterov.

In Delayed Nesterov (arXiv 2401.09135, section 5), the momentum m changes in every N-th step only. With Δ the sum of the
period's gradients, β the momentum, c the activation and ε the learning rate,

    m <- β m + Δ/N    y <- y - ε ((1 - c N + c) β m + g/N)    in a period's last step
                      y <- y - ε (c β m + g/N)                in those before

N = 1 gives Nesterov momentum, which is the baseline SGD's rule. x is y.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from freestep.api.hyperparameters import DiLoCo
from freestep_service.optimizers.method import Conditions, Method, Scalars
from freestep_service.optimizers.methods.baselines import SGD, SGDCoefficients

__all__ = ["DELAYED_NESTEROV", "NESTEROV"]


def _advance_nesterov(h: DiLoCo, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, SGDCoefficients]:
    lr = conditions.limited(h.lr)
    return {"k": scalars["k"] + 1, "scheduled_lr": lr}, SGDCoefficients(
        lr=lr,
        weight_decay=0.0,
        momentum=h.momentum,
        has_momentum=h.momentum > 0,
        gain=1.0,
        nesterov=h.nesterov,
    )


class _Delayed(NamedTuple):
    kept: float
    """The factor on the previous Δ: 0 in a period's first step, else 1."""
    decay: float
    """The factor on m: β in a period's last step, else 1."""
    gain: float
    """The weight of Δ in m: 1/N in a period's last step, else 0."""
    m_step: float
    g_step: float


def _advance_delayed(h: DiLoCo, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Delayed]:
    period, activation = h.momentum_period, h.momentum_activation
    lr, k = conditions.limited(h.lr), scalars["k"]
    ends = (k + 1) % period == 0
    share = 1 - activation * period + activation if ends else activation
    return {"k": k + 1, "scheduled_lr": lr}, _Delayed(
        kept=float(k % period > 0),
        decay=h.momentum if ends else 1.0,
        gain=1 / period if ends else 0.0,
        m_step=lr * share * h.momentum,
        g_step=lr / period,
    )


def _delayed(g: Tensor, y: Tensor, m: Tensor, total: Tensor, s: _Delayed) -> tuple[Tensor, Tensor, Tensor]:
    total = s.kept * total + g
    m = s.decay * m + s.gain * total
    return y - (s.m_step * m + s.g_step * g), m, total


NESTEROV = Method(SGD.buffers, {"k": 0}, _advance_nesterov, SGD.rule)
DELAYED_NESTEROV = Method(("y", "momentum_buffer", "gradient_sum"), {"k": 0}, _advance_delayed, _delayed)
