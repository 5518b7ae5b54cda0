"""Schedule-Free SGD, AdamW and RAdam (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682).

Only y and z are kept. Equations 9 to 11 of the paper, with x eliminated, give for a step direction d

    y <- (1 - c) y + c z + γ (β (1 - c) - 1) d        z <- z - γ d        c = w_k / Σ w

where w_k = (k+1)^r · γ_max^weight_lr_power and γ is the learning rate after warmup, as in the `schedulefree` package.
SGD has d = g; the Adam forms have d = g / (sqrt(v / (1 - β2^(k+1))) + eps), with v the moving average of g². Inner
momentum μ replaces that g by m / (1 - μ^(k+1)), with m the moving average of g. Weight decay adds weight_decay · y, or
weight_decay · z, to d. Where gradients are stale, β changes from step to step (`averages`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api.hyperparameters import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from freestep_service.optimizers.method import Conditions, Method, Scalars
from freestep_service.optimizers.methods.averages import INITIAL, Average, averaged, interpolation
from freestep_service.optimizers.methods.schedules import warmup

__all__ = ["ADAMW", "ADAMW_INNER_MOMENTUM", "RADAM", "SGD"]


class _Coefficients(NamedTuple):
    """The coefficients of SGD."""

    lr: float
    z_share: float
    """The coefficient of z - y in the change of y: c, where β is constant."""
    y_lr: float
    """γ (β (1 - c) - 1): the coefficient of d in the change of y."""
    z_pull: float
    """z decreases by this share of z - y before the step, if `pulls`."""
    pulls: bool
    """Whether the expected staleness has changed. Loops without that term are a little faster."""
    weight_decay: float


class _AdamCoefficients(NamedTuple):
    """The coefficients of the Adam forms. Those that SGD has too mean the same."""

    lr: float
    z_share: float
    y_lr: float
    z_pull: float
    pulls: bool
    weight_decay: float
    beta2: float
    v_share: float
    """1 - β2: the weight of g² in v."""
    correction: float
    """1 / sqrt(1 - β2^(k+1)): the bias correction of the root of v."""
    eps: float
    adaptive: bool
    """Whether d is divided by the root of v; in RAdam's first steps it is not."""
    decay_at_z: bool
    m_share: float
    """1 - μ: the weight of g in m."""
    m_correction: float
    """1 / (1 - μ^(k+1)): the bias correction of m."""


def _advance_sgd(h: SGDScheduleFree, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
    lr = h.lr * warmup(scalars["k"], h.warmup_steps)
    average = averaged(h, scalars, lr, conditions)
    lr = average.conditions.limited(lr)
    return {**average.scalars, "scheduled_lr": lr}, _Coefficients(
        lr, average.z_share, lr * average.y_share, average.z_pull, average.z_pull != 0, h.weight_decay
    )


def _sgd(g: Tensor, y: Tensor, z: Tensor, s: _Coefficients) -> tuple[Tensor, Tensor]:
    d = g + s.weight_decay * y
    next_y = y + s.z_share * (z - y) + s.y_lr * d
    z = z - s.z_pull * (z - y) if s.pulls else z
    return next_y, z - s.lr * d


def _advance_adamw(h: AdamWScheduleFree, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _AdamCoefficients]:
    lr = h.lr * warmup(scalars["k"], h.warmup_steps)
    average = averaged(h, scalars, lr, conditions)
    lr = average.conditions.limited(lr)
    return {**average.scalars, "scheduled_lr": lr}, _adam_coefficients(
        h, lr, average, adaptive=True, decay_at_z=h.decay_at_z, inner_momentum=h.inner_momentum
    )


def _advance_radam(h: RAdamScheduleFree, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _AdamCoefficients]:
    _, beta2 = h.betas
    step = scalars["k"] + 1
    bias_correction2 = 1 - beta2**step
    # The length of the approximated simple moving average and its limit: arXiv 1908.03265, section 4.1.
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / bias_correction2
    adaptive = rho > 4
    if adaptive:
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    else:
        rectification = 0.0 if h.silent_sgd_phase else 1.0
    average = averaged(h, scalars, h.lr * rectification, conditions)
    lr = average.conditions.limited(h.lr) * rectification
    return {**average.scalars, "scheduled_lr": lr}, _adam_coefficients(h, lr, average, adaptive=adaptive)


def _adam_coefficients(
    h: AdamWScheduleFree | RAdamScheduleFree,
    lr: float,
    average: Average,
    *,
    adaptive: bool,
    decay_at_z: bool = False,
    inner_momentum: float = 0.0,
) -> _AdamCoefficients:
    _, beta2 = h.betas
    step = average.scalars["k"]
    return _AdamCoefficients(
        lr=lr,
        z_share=average.z_share,
        y_lr=lr * average.y_share,
        z_pull=average.z_pull,
        pulls=average.z_pull != 0,
        weight_decay=h.weight_decay,
        beta2=beta2,
        v_share=1 - beta2,
        correction=(1 - beta2**step) ** -0.5,
        eps=h.eps,
        adaptive=adaptive,
        decay_at_z=decay_at_z,
        m_share=1 - inner_momentum,
        m_correction=1 / (1 - inner_momentum**step),
    )


def _adam(g: Tensor, y: Tensor, z: Tensor, v: Tensor, s: _AdamCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    v = s.beta2 * v + s.v_share * (g * g)
    d = g / (torch.sqrt(v) * s.correction + s.eps) if s.adaptive else g
    d = d + s.weight_decay * (z if s.decay_at_z else y)
    next_y = y + s.z_share * (z - y) + s.y_lr * d
    z = z - s.z_pull * (z - y) if s.pulls else z
    return next_y, z - s.lr * d, v


def _adam_inner_momentum(
    g: Tensor, y: Tensor, z: Tensor, v: Tensor, m: Tensor, s: _AdamCoefficients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = s.beta2 * v + s.v_share * (g * g)
    m = m + s.m_share * (g - m)
    d = s.m_correction * m / (torch.sqrt(v) * s.correction + s.eps)
    d = d + s.weight_decay * (z if s.decay_at_z else y)
    next_y = y + s.z_share * (z - y) + s.y_lr * d
    z = z - s.z_pull * (z - y) if s.pulls else z
    return next_y, z - s.lr * d, v, m


SGD = Method(("y", "z"), INITIAL, _advance_sgd, _sgd, interpolation)
ADAMW = Method(("y", "z", "exp_avg_sq"), INITIAL, _advance_adamw, _adam, interpolation)
ADAMW_INNER_MOMENTUM = Method(
    ("y", "z", "exp_avg_sq", "exp_avg"), INITIAL, _advance_adamw, _adam_inner_momentum, interpolation
)
RADAM = Method(("y", "z", "exp_avg_sq"), INITIAL, _advance_radam, _adam, interpolation)
