"""Schedule-Free SGD, AdamW and RAdam (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682).

Only y and z are kept. Equations 9 to 11 of the paper with x eliminated give, for a step direction d,

    y <- (1 - c) y + c z + γ (β (1 - c) - 1) d        z <- z - γ d        c = w_k / Σ w

where w_k = (k+1)^r · γ_max^weight_lr_power and γ is the learning rate after warmup, as the `schedulefree`
package has them. SGD takes d = g; the Adam forms take d = g / (sqrt(v / (1 - β2^(k+1))) + eps), with v the
moving average of g². Weight decay adds weight_decay · y to d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freestep.hyperparameters import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from freestep_service.optimizers.method import Method, Scalars

__all__ = ["ADAMW", "RADAM", "SGD"]

_INITIAL: Scalars = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


class _Coefficients(NamedTuple):
    """What SGD takes."""

    lr: float
    c: float
    y_lr: float
    """γ (β (1 - c) - 1): what y moves by along d."""
    weight_decay: float


class _AdamCoefficients(NamedTuple):
    """What the Adam forms take."""

    lr: float
    c: float
    y_lr: float
    weight_decay: float
    beta2: float
    v_share: float
    """1 - β2: the weight of g² in v."""
    correction: float
    """1 / sqrt(1 - β2^(k+1)), of the root of v."""
    eps: float
    adaptive: bool
    """Whether d is divided by the root of v; RAdam's first steps are not."""


def _average(scalars: Scalars, lr: float, r: float, weight_lr_power: float) -> tuple[dict[str, float], float]:
    """The next averaging scalars and c, the weight of the newest z in the average."""
    k = scalars["k"]
    lr_max = max(lr, scalars["lr_max"])
    weight: float = (k + 1) ** r * lr_max**weight_lr_power
    weight_sum = scalars["weight_sum"] + weight
    c = weight / weight_sum if weight_sum else 0.0
    return {"k": k + 1, "weight_sum": weight_sum, "lr_max": lr_max}, c


def _warmup(k: float, warmup_steps: int) -> float:
    return (k + 1) / warmup_steps if k < warmup_steps else 1.0


def _advance_sgd(h: SGDScheduleFree, scalars: Scalars, damping: float) -> tuple[Scalars, _Coefficients]:
    lr = h.lr * _warmup(scalars["k"], h.warmup_steps)
    following, c = _average(scalars, lr, h.r, h.weight_lr_power)
    lr *= damping
    return following, _Coefficients(lr, c, lr * (h.momentum * (1 - c) - 1), h.weight_decay)


def _sgd(g: Tensor, y: Tensor, z: Tensor, s: _Coefficients) -> tuple[Tensor, Tensor]:
    d = g + s.weight_decay * y
    return y + s.c * (z - y) + s.y_lr * d, z - s.lr * d


def _advance_adamw(h: AdamWScheduleFree, scalars: Scalars, damping: float) -> tuple[Scalars, _AdamCoefficients]:
    lr = h.lr * _warmup(scalars["k"], h.warmup_steps)
    following, c = _average(scalars, lr, h.r, h.weight_lr_power)
    lr *= damping
    return following, _adam_coefficients(h, lr, c, following["k"], adaptive=True)


def _advance_radam(h: RAdamScheduleFree, scalars: Scalars, damping: float) -> tuple[Scalars, _AdamCoefficients]:
    _, beta2 = h.betas
    step = scalars["k"] + 1
    bias_correction2 = 1 - beta2**step
    # The length of the approximated simple moving average, arXiv 1908.03265, section 4.1, and its limit.
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / bias_correction2
    adaptive = rho > 4
    if adaptive:
        rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    else:
        rectification = 0.0 if h.silent_sgd_phase else 1.0
    lr = h.lr * rectification
    following, c = _average(scalars, lr, h.r, h.weight_lr_power)
    lr *= damping
    return following, _adam_coefficients(h, lr, c, step, adaptive=adaptive)


def _adam_coefficients(
    h: AdamWScheduleFree | RAdamScheduleFree, lr: float, c: float, step: float, *, adaptive: bool
) -> _AdamCoefficients:
    beta1, beta2 = h.betas
    return _AdamCoefficients(
        lr=lr,
        c=c,
        y_lr=lr * (beta1 * (1 - c) - 1),
        weight_decay=h.weight_decay,
        beta2=beta2,
        v_share=1 - beta2,
        correction=(1 - beta2**step) ** -0.5,
        eps=h.eps,
        adaptive=adaptive,
    )


def _adam(g: Tensor, y: Tensor, z: Tensor, v: Tensor, s: _AdamCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    v = s.beta2 * v + s.v_share * (g * g)
    d = g / (torch.sqrt(v) * s.correction + s.eps) if s.adaptive else g
    d = d + s.weight_decay * y
    return y + s.c * (z - y) + s.y_lr * d, z - s.lr * d, v


SGD = Method(("y", "z"), _INITIAL, _advance_sgd, _sgd, lambda h: float(h.momentum))
ADAMW = Method(("y", "z", "exp_avg_sq"), _INITIAL, _advance_adamw, _adam, lambda h: float(h.betas[0]))
RADAM = Method(("y", "z", "exp_avg_sq"), _INITIAL, _advance_radam, _adam, lambda h: float(h.betas[0]))
