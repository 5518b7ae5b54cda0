"""ScheduleFree+: AdamC and Schedule-Free with a Polyak step size (Defazio, arXiv 2605.19095).

With F the loss at y, g the gradient there, and all sums over all parameters,

    e = (β_p e + (1 - β_p) sqrt(π/2) |g|₁) / (1 - β_p^t)        I = β̃ <g, z - x>        η = γ max(0, F + I) / e
    z <- z - η² λ y - η m̂ / (sqrt(v̂) + eps)     x <- (1 - c) x + c z     y = β̃ x + (1 - β̃) z

where m̂ and v̂ are Adam's, t counts steps from 1, and c is Schedule-Free's with η as learning rate. β̃ changes from step
to step, so x is a state vector.

This e is that of the author's AdamCScheduleFreePlusPaper (github.com/facebookresearch/schedule_free), which keeps the
corrected average and averages on from it. The paper's equation keeps e = β_p e + (1 - β_p) sqrt(π/2) |g|₁ itself, and
divides by e / (1 - β_p^t). They agree for β_p = 0, the default. For others the code's e first grows far beyond the
gradient's norm, and η is almost 0 until it has come back: with β_p = 0.9 it is up to 3,900 times as large, and comes
back after 130 steps; with 0.99 after 16,000.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api.hyperparameters import AdamCScheduleFreePlus
from freestep_service.optimizers.method import Conditions, Method, Scalars
from freestep_service.optimizers.methods.schedules import warmup

__all__ = ["ADAMC_PLUS"]

_MAX_LR = 1e12
"""The bound of hyperparameters too: no coefficient overflows fp32 where gradients are almost 0."""
_MAX_NORM = 1e300
"""An average that has once become infinite stays so."""


class _Coefficients(NamedTuple):
    decay: float
    """η² λ: the coefficient of y in the decrease of z."""
    step_size: float
    """η / (1 - β1^t)."""
    m_share: float
    """1 - β1: the weight of g in m."""
    beta2: float
    v_share: float
    """1 - β2: the weight of g² in v."""
    correction: float
    """1 / sqrt(1 - β2^t): the bias correction of the root of v."""
    eps: float
    x_kept: float
    """1 - c."""
    c: float
    x_share: float
    """β̃."""
    z_share: float
    """1 - β̃."""


def _beta(h: AdamCScheduleFreePlus, k: float) -> float:
    """β̃ of step k: 1 - β̃ falls geometrically from 1 - sf_beta1 to 1 - sf_beta1_max."""
    if not h.sf_beta1_anneal_steps:
        return h.sf_beta1
    progress = min(k / h.sf_beta1_anneal_steps, 1.0)
    return float(1 - (1 - h.sf_beta1) ** (1 - progress) * (1 - h.sf_beta1_max) ** progress)


def _advance(h: AdamCScheduleFreePlus, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
    k = scalars["k"]
    t, beta, (beta1, beta2) = k + 1, _beta(h, k), h.betas
    average = h.polyak_beta * scalars["grad_l1_ema"] + (1 - h.polyak_beta) * math.sqrt(math.pi / 2) * conditions.grad_l1
    norm = min(average / (1 - h.polyak_beta**t), _MAX_NORM)
    polyak = max(0.0, conditions.loss + beta * conditions.grad_dot) / norm if norm else 0.0
    lr = min(max(h.lr, h.eps) * warmup(k, h.warmup_steps) * polyak, _MAX_LR)
    next_scalars = {**scalars, "k": t, "grad_l1_ema": norm, "lr_max": max(lr, scalars["lr_max"], h.eps)}
    c = 1.0
    if k >= h.c_warmup:
        weight = t**h.r * next_scalars["lr_max"] ** h.weight_lr_power
        next_scalars["weight_sum"] = scalars["weight_sum"] + weight
        c = weight / next_scalars["weight_sum"] if next_scalars["weight_sum"] else 1.0
    next_scalars["scheduled_lr"] = lr = conditions.limited(lr)
    return next_scalars, _Coefficients(
        decay=lr * lr * h.weight_decay,
        step_size=lr / (1 - beta1**t),
        m_share=1 - beta1,
        beta2=beta2,
        v_share=1 - beta2,
        correction=(1 - beta2**t) ** -0.5,
        eps=h.eps,
        x_kept=1 - c,
        c=c,
        x_share=beta,
        z_share=1 - beta,
    )


def _adamc(
    g: Tensor, y: Tensor, x: Tensor, z: Tensor, m: Tensor, v: Tensor, s: _Coefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m = m + s.m_share * (g - m)
    v = s.beta2 * v + s.v_share * (g * g)
    z = z - s.decay * y - s.step_size * (m / (torch.sqrt(v) * s.correction + s.eps))
    x = s.x_kept * x + s.c * z
    return s.x_share * x + s.z_share * z, x, z, m, v


ADAMC_PLUS = Method(
    ("y", "x", "z", "exp_avg", "exp_avg_sq"),
    {"k": 0, "weight_sum": 0.0, "lr_max": 0.0, "grad_l1_ema": 0.0},
    _advance,
    _adamc,
    needs_sums=True,
)
