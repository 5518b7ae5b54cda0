"""The baselines: SGD with momentum, and AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in `torch.optim`.

They keep one point, y. x is y, or the average of y where the hyperparameters have one (`averaging`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api.hyperparameters import SGD as SGDSpec
from freestep.api.hyperparameters import AdamW as AdamWSpec
from freestep_service.optimizers.method import Conditions, Method, Scalars
from freestep_service.optimizers.methods.averaging import averaged
from freestep_service.optimizers.methods.plateau import observe, remaining, retune
from freestep_service.optimizers.methods.schedules import scheduled

__all__ = ["ADAMW", "AVERAGED_ADAMW", "AVERAGED_SGD", "SGD", "SGDCoefficients"]


class SGDCoefficients(NamedTuple):
    """The coefficients of SGD."""

    lr: float
    weight_decay: float
    momentum: float
    has_momentum: bool
    gain: float
    """The weight of the gradient in the momentum buffer: 1 - dampening, or 1 in the first step."""
    nesterov: bool


def _advance_sgd(h: SGDSpec, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, SGDCoefficients]:
    k = scalars["k"]
    lr = conditions.limited(scheduled(remaining(h, scalars), h.schedule, k))
    # As in torch, the buffer is initialized with the first gradient, without dampening.
    gain = 1 - h.dampening if k else 1.0
    return {**scalars, "k": k + 1, "scheduled_lr": lr}, SGDCoefficients(
        lr, h.weight_decay, h.momentum, h.momentum > 0, gain, h.nesterov
    )


def _sgd(g: Tensor, y: Tensor, buffer: Tensor, s: SGDCoefficients) -> tuple[Tensor, Tensor]:
    g = g + s.weight_decay * y
    d = g
    if s.has_momentum:
        buffer = s.momentum * buffer + s.gain * g
        d = g + s.momentum * buffer if s.nesterov else buffer
    return y - s.lr * d, buffer


class _AdamWCoefficients(NamedTuple):
    shrink: float
    """1 - γ λ: the factor of decoupled weight decay on y."""
    m_share: float
    """1 - β1: the weight of g in m."""
    beta2: float
    v_share: float
    """1 - β2: the weight of g² in v."""
    correction: float
    """1 / sqrt(1 - β2^t): the bias correction of the root of v."""
    eps: float
    step_size: float
    """γ / (1 - β1^t)."""


def _advance_adamw(h: AdamWSpec, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _AdamWCoefficients]:
    beta1, beta2 = h.betas
    step = scalars["k"] + 1
    lr = conditions.limited(scheduled(remaining(h, scalars), h.schedule, scalars["k"]))
    return {**scalars, "k": step, "scheduled_lr": lr}, _AdamWCoefficients(
        shrink=1 - lr * h.weight_decay,
        m_share=1 - beta1,
        beta2=beta2,
        v_share=1 - beta2,
        correction=(1 - beta2**step) ** -0.5,
        eps=h.eps,
        step_size=lr / (1 - beta1**step),
    )


def _adamw(g: Tensor, y: Tensor, m: Tensor, v: Tensor, s: _AdamWCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    m = m + s.m_share * (g - m)
    v = s.beta2 * v + s.v_share * (g * g)
    return s.shrink * y - s.step_size * (m / (torch.sqrt(v) * s.correction + s.eps)), m, v


SGD = Method(("y", "momentum_buffer"), {"k": 0}, _advance_sgd, _sgd, observe=observe, retune=retune)
ADAMW = Method(("y", "exp_avg", "exp_avg_sq"), {"k": 0}, _advance_adamw, _adamw, observe=observe, retune=retune)
AVERAGED_SGD = averaged(SGD)
AVERAGED_ADAMW = averaged(ADAMW)
