"""The bases with moving averages of gradients and of their squares: torch's Adam, AdamW, NAdam, RAdam and Adamax.

NAdam's product of momenta is kept in double precision; torch has fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api import bases as specs
from freestep_service.optimizers.method import Base, Conditions, Scalars

__all__ = ["ADAM", "ADAMAX", "ADAMW", "ADAMW_AMSGRAD", "ADAM_AMSGRAD", "NADAM", "RADAM", "Moments"]


class Moments(NamedTuple):
    """The coefficients of all of them but Adamax. m, v: the moving averages of g and of g²."""

    weight_decay: float
    """The coefficient of z that is added to g; 0 where weight decay is decoupled."""
    shrink: float
    """γ λ: the coefficient of z in the step, for decoupled weight decay; else 0."""
    m_share: float
    """1 - β1: the weight of g in m."""
    beta2: float
    v_share: float
    """1 - β2: the weight of g² in v."""
    correction: float
    """The factor on the root of v: its bias correction 1 / sqrt(1 - β2^t), or 1 where `m_step` contains that."""
    eps: float
    g_step: float
    """The coefficient of g in the step, beside that of m."""
    m_step: float
    adaptive: bool
    """Whether the step is divided by the root of v; in RAdam's first steps it is not."""


def _moments(
    h: specs.BaseAdam | specs.BaseAdamW | specs.BaseNAdam | specs.BaseRAdam,
    lr: float,
    *,
    decoupled: bool,
    m_step: float,
    g_step: float = 0.0,
    correction: float = 1.0,
    adaptive: bool = True,
) -> Moments:
    beta1, beta2 = h.betas
    return Moments(
        weight_decay=0.0 if decoupled else h.weight_decay,
        shrink=lr * h.weight_decay if decoupled else 0.0,
        m_share=1 - beta1,
        beta2=beta2,
        v_share=1 - beta2,
        correction=correction,
        eps=h.eps,
        g_step=g_step,
        m_step=m_step,
        adaptive=adaptive,
    )


def _corrected(
    h: specs.BaseAdam | specs.BaseAdamW, lr: float, scalars: Scalars, *, decoupled: bool
) -> tuple[Scalars, Moments]:
    beta1, beta2 = h.betas
    t = scalars["k"] + 1
    return {}, _moments(h, lr, decoupled=decoupled, m_step=lr / (1 - beta1**t), correction=(1 - beta2**t) ** -0.5)


def _advance_adam(h: specs.BaseAdam, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, Moments]:
    return _corrected(h, conditions.limited(lr), scalars, decoupled=h.decoupled_weight_decay)


def _advance_adamw(h: specs.BaseAdamW, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, Moments]:
    return _corrected(h, conditions.limited(lr), scalars, decoupled=True)


def _advance_nadam(h: specs.BaseNAdam, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, Moments]:
    beta1, beta2 = h.betas
    t = scalars["k"] + 1
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (step * h.momentum_decay)) for step in (t, t + 1))
    product = scalars["mu_product"] * mu
    lr = conditions.limited(lr)
    return {"mu_product": product}, _moments(
        h,
        lr,
        decoupled=h.decoupled_weight_decay,
        g_step=lr * (1 - mu) / (1 - product),
        m_step=lr * mu_next / (1 - product * mu_next),
        correction=(1 - beta2**t) ** -0.5,
    )


def _advance_radam(h: specs.BaseRAdam, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, Moments]:
    beta1, beta2 = h.betas
    t = scalars["k"] + 1
    # The length of the approximated simple moving average and its limit: arXiv 1908.03265, section 4.1.
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / (1 - beta2**t)
    adaptive = length > 5
    lr = conditions.limited(lr)
    m_step = lr / (1 - beta1**t)
    if adaptive:
        rectification = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        m_step *= (rectification * (1 - beta2**t)) ** 0.5
    return {}, _moments(h, lr, decoupled=h.decoupled_weight_decay, m_step=m_step, adaptive=adaptive)


def _adam(g: Tensor, z: Tensor, m: Tensor, v: Tensor, s: Moments) -> tuple[Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    m = m + s.m_share * (g - m)
    v = s.beta2 * v + s.v_share * (g * g)
    d = s.g_step * g + s.m_step * m
    d = d / (torch.sqrt(v) * s.correction + s.eps) if s.adaptive else d
    return s.shrink * z + d, m, v


def _amsgrad(
    g: Tensor, z: Tensor, m: Tensor, v: Tensor, largest: Tensor, s: Moments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    m = m + s.m_share * (g - m)
    v = s.beta2 * v + s.v_share * (g * g)
    largest = torch.maximum(largest, v)
    d = s.m_step * m / (torch.sqrt(largest) * s.correction + s.eps)
    return s.shrink * z + d, m, v, largest


class _Adamax(NamedTuple):
    weight_decay: float
    m_share: float
    beta2: float
    eps: float
    m_step: float


def _advance_adamax(
    h: specs.BaseAdamax, lr: float, scalars: Scalars, conditions: Conditions
) -> tuple[Scalars, _Adamax]:
    beta1, beta2 = h.betas
    return {}, _Adamax(
        h.weight_decay, 1 - beta1, beta2, h.eps, conditions.limited(lr) / (1 - beta1 ** (scalars["k"] + 1))
    )


def _adamax(g: Tensor, z: Tensor, m: Tensor, norm: Tensor, s: _Adamax) -> tuple[Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    m = m + s.m_share * (g - m)
    norm = torch.maximum(s.beta2 * norm, torch.abs(g) + s.eps)
    return s.m_step * (m / norm), m, norm


ADAM = Base(("exp_avg", "exp_avg_sq"), _advance_adam, _adam)
ADAM_AMSGRAD = Base(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _advance_adam, _amsgrad)
ADAMW = Base(("exp_avg", "exp_avg_sq"), _advance_adamw, _adam)
ADAMW_AMSGRAD = Base(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _advance_adamw, _amsgrad)
NADAM = Base(("exp_avg", "exp_avg_sq"), _advance_nadam, _adam, {"mu_product": 1.0})
RADAM = Base(("exp_avg", "exp_avg_sq"), _advance_radam, _adam)
ADAMAX = Base(("exp_avg", "exp_inf"), _advance_adamax, _adamax)
