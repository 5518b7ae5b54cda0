"""The bases that step along orthogonal matrices: Muon and NorMuon, with AdamW for the parameters that are no matrices.

    m <- μ m + (1 - μ) g        P = polar(m)        z <- z - γ (λ z + s P)

polar(m) is U Vᵀ of m = U Σ Vᵀ, approximated by Newton-Schulz iterations. Muon has s = sqrt(max(1, rows / columns)), or
0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), and with Nesterov momentum takes polar((1 - μ) g + μ m). It equals
`torch.optim.Muon`, except that the iterations are in the matrix's own dtype, and torch's in bfloat16.

NorMuon (arXiv 2510.05491) divides the rows of P by the root of the moving average v of their mean squares, and scales
the result to the size of Adam's steps:

    v <- β2 v + (1 - β2) mean(P²) of each row        Q = P / (sqrt(v) + ε)        s P = 0.2 sqrt(rows · columns) Q / ‖Q‖

Schedule-Free over it is SF-NorMuon (arXiv 2605.23061), whose weight decay is at z too.

v is kept as a matrix whose rows are constant, so that matrices have the state vectors that AdamW has.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api import bases as specs
from freestep_service.optimizers.kernels.compiled import inlined
from freestep_service.optimizers.method import Base, Conditions, Direction, Scalars
from freestep_service.optimizers.methods import moments

__all__ = ["MATRICES", "polar"]

_Specs = specs.BaseMuon | specs.BaseNorMuon | specs.BaseAdamW


class _Coefficients(NamedTuple):
    has_direction: bool
    """Whether g is a matrix's direction, and not a gradient."""
    shrink: float
    """γ λ: the coefficient of z in the step, for weight decay."""
    step: float
    adamw: moments.Moments


_UNUSED = moments.ADAMW.advance(specs.BaseAdamW(), 0.0, {"k": 0}, Conditions())[1]


def _advance(h: _Specs, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Coefficients]:
    if isinstance(h, specs.BaseAdamW):
        changed, adamw = moments.ADAMW.advance(h, lr, scalars, conditions)
        return changed, _Coefficients(False, 0.0, 0.0, adamw)
    lr = conditions.limited(lr)
    return {}, _Coefficients(True, lr * h.weight_decay, lr, _UNUSED)


_adamw = inlined(moments.ADAMW.rule)


def _rule(g: Tensor, z: Tensor, m: Tensor, v: Tensor, s: _Coefficients) -> tuple[Tensor, ...]:
    return (s.shrink * z + s.step * g, m, v) if s.has_direction else _adamw(g, z, m, v, s.adamw)


def _direction(h: _Specs) -> Direction | None:
    match h:
        case specs.BaseMuon():
            return partial(_muon, h)
        case specs.BaseNorMuon():
            return partial(_normuon, h)
        case _:
            return None


def _muon(h: specs.BaseMuon, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m.lerp_(g, 1 - h.momentum)
    rows, columns = g.shape
    adam = h.adjust_lr_fn == "match_rms_adamw"
    scale = 0.2 * math.sqrt(max(rows, columns)) if adam else math.sqrt(max(1, rows / columns))
    return polar(g.lerp(m, h.momentum) if h.nesterov else m, h) * scale


def _normuon(h: specs.BaseNorMuon, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m.lerp_(g, 1 - h.momentum)
    p = polar(m, h)
    v.lerp_((p * p).mean(1, keepdim=True).expand_as(v), 1 - h.beta2)
    q = p / (v.sqrt() + h.eps)
    q /= q.norm().clamp(min=h.eps)
    return q * (0.2 * math.sqrt(q.numel()))


def polar(m: Tensor, h: specs.MatrixBase) -> Tensor:
    """Approximately the orthogonal polar factor of a matrix, [rows, columns], by Newton-Schulz iterations."""
    a, b, c = h.ns_coefficients
    # Of x xᵀ and xᵀ x, the iterations use the smaller.
    is_tall = m.shape[0] > m.shape[1]
    x = m.T if is_tall else m
    # They converge where all singular values are at most 1; the Frobenius norm bounds the largest.
    x = x / x.norm().clamp(min=h.eps)
    for _ in range(h.ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


MATRICES = Base(("exp_avg", "exp_avg_sq"), _advance, _rule, direction=_direction)
