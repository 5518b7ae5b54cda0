"""The bases that step along orthogonal matrices: Muon and NorMuon, with AdamW for what is no matrix beside them.

    m <- μ m + (1 - μ) g        P = polar(m)        z <- z - γ (λ z + s P)

polar(m) is U Vᵀ of m = U Σ Vᵀ, to which Newton-Schulz iterations come near. Muon has s = sqrt(max(1, rows / columns)),
or 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), and with Nesterov momentum takes polar((1 - μ) g + μ m). That is
`torch.optim.Muon`, which iterates in bfloat16 where this does so in the matrix's own dtype.

NorMuon (arXiv 2510.05491) divides the rows of P by the root of their mean squares' moving average v, and has the whole
as large as Adam's steps are:

    v <- β2 v + (1 - β2) mean(P²) of each row        Q = P / (sqrt(v) + ε)        s P = 0.2 sqrt(rows · columns) Q / ‖Q‖

Schedule-Free over it is SF-NorMuon (arXiv 2605.23061), whose weight decay takes z too.

The elements of v stand in a whole vector, each as often as its row is long, so that matrices keep what AdamW keeps.
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
    """Whether g is a direction made of a matrix, and not a gradient."""
    shrink: float
    """γ λ: what of z weight decay takes away."""
    step: float
    adamw: moments.Moments


_UNUSED = moments.ADAMW.advance(specs.BaseAdamW(), 0.0, {"k": 0}, Conditions())[1]


def _advance(h: _Specs, lr: float, scalars: Scalars, taken: Conditions) -> tuple[Scalars, _Coefficients]:
    if isinstance(h, specs.BaseAdamW):
        kept, adamw = moments.ADAMW.advance(h, lr, scalars, taken)
        return kept, _Coefficients(False, 0.0, 0.0, adamw)
    lr = taken.rate(lr)
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
    """About the orthogonal factor of a matrix, [rows, columns], whose singular values the iterations bring near 1."""
    a, b, c = h.ns_coefficients
    # The smaller of the two products.
    is_tall = m.shape[0] > m.shape[1]
    x = m.T if is_tall else m
    # The largest singular value is at most the norm.
    x = x / x.norm().clamp(min=h.eps)
    for _ in range(h.ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


MATRICES = Base(("exp_avg", "exp_avg_sq"), _advance, _rule, direction=_direction)
