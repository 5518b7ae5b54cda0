"""The elementwise optimizers of `torch.optim` as bases: the step of each along a gradient.

They equal torch's classes, and are written from the papers that torch's documentation cites. RMSprop's variance is
clamped to 0 where rounding makes it negative, of which torch takes the root.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freestep.api import bases as specs
from freestep_service.optimizers.method import Base, Conditions, Scalars
from freestep_service.optimizers.methods import moments
from freestep_service.optimizers.methods.muon import MATRICES

__all__ = ["SGD", "base_of"]


class _SGD(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    gain: float
    """The weight of the gradient in the momentum buffer: 1 - dampening, or 1 in the first step."""
    nesterov: bool


def _advance_sgd(h: specs.BaseSGD, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _SGD]:
    # As in torch, the buffer is initialized with the first gradient, without dampening.
    gain = 1 - h.dampening if scalars["k"] else 1.0
    return {}, _SGD(conditions.limited(lr), h.weight_decay, h.momentum, gain, h.nesterov)


def _sgd(g: Tensor, z: Tensor, s: _SGD) -> tuple[Tensor]:
    return (s.lr * (g + s.weight_decay * z),)


def _sgd_momentum(g: Tensor, z: Tensor, buffer: Tensor, s: _SGD) -> tuple[Tensor, Tensor]:
    g = g + s.weight_decay * z
    buffer = s.momentum * buffer + s.gain * g
    return s.lr * (g + s.momentum * buffer if s.nesterov else buffer), buffer


class _RMSprop(NamedTuple):
    lr: float
    weight_decay: float
    alpha: float
    share: float
    """1 - alpha: the weight of the new value in the averages."""
    eps: float
    momentum: float


def _advance_rmsprop(
    h: specs.BaseRMSprop, lr: float, scalars: Scalars, conditions: Conditions
) -> tuple[Scalars, _RMSprop]:
    return {}, _RMSprop(conditions.limited(lr), h.weight_decay, h.alpha, 1 - h.alpha, h.eps, h.momentum)


def _rmsprop(g: Tensor, z: Tensor, v: Tensor, s: _RMSprop) -> tuple[Tensor, Tensor]:
    g = g + s.weight_decay * z
    v = s.alpha * v + s.share * (g * g)
    return s.lr * (g / (torch.sqrt(v) + s.eps)), v


def _rmsprop_momentum(g: Tensor, z: Tensor, v: Tensor, b: Tensor, s: _RMSprop) -> tuple[Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    v = s.alpha * v + s.share * (g * g)
    b = s.momentum * b + g / (torch.sqrt(v) + s.eps)
    return s.lr * b, v, b


def _rmsprop_centered(g: Tensor, z: Tensor, v: Tensor, m: Tensor, s: _RMSprop) -> tuple[Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    v = s.alpha * v + s.share * (g * g)
    m = m + s.share * (g - m)
    return s.lr * (g / (torch.sqrt(torch.relu(v - m * m)) + s.eps)), v, m


def _rmsprop_centered_momentum(
    g: Tensor, z: Tensor, v: Tensor, m: Tensor, b: Tensor, s: _RMSprop
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = g + s.weight_decay * z
    v = s.alpha * v + s.share * (g * g)
    m = m + s.share * (g - m)
    b = s.momentum * b + g / (torch.sqrt(torch.relu(v - m * m)) + s.eps)
    return s.lr * b, v, m, b


class _Adagrad(NamedTuple):
    lr: float
    weight_decay: float
    added: float
    """The initial sum of squares in the first step; then 0."""
    eps: float


def _advance_adagrad(
    h: specs.BaseAdagrad, lr: float, scalars: Scalars, conditions: Conditions
) -> tuple[Scalars, _Adagrad]:
    k = scalars["k"]
    added = 0.0 if k else h.initial_accumulator_value
    return {}, _Adagrad(conditions.limited(lr / (1 + k * h.lr_decay)), h.weight_decay, added, h.eps)


def _adagrad(g: Tensor, z: Tensor, total: Tensor, s: _Adagrad) -> tuple[Tensor, Tensor]:
    g = g + s.weight_decay * z
    total = total + s.added + g * g
    return s.lr * (g / (torch.sqrt(total) + s.eps)), total


_LARGEST_STEP = 1e12
"""Of the hyperparameters: a bound that no step of Rprop's reaches."""


class _Rprop(NamedTuple):
    damping: float
    most: float
    """The bound on the learning rate, and so on the steps."""
    added: float
    """The initial step size in the first step; then 0."""
    shrink: float
    grow: float
    smallest: float
    largest: float
    zero: float = 0.0


def _advance_rprop(h: specs.BaseRprop, lr: float, scalars: Scalars, conditions: Conditions) -> tuple[Scalars, _Rprop]:
    most = min(conditions.max_lr, _LARGEST_STEP)
    return {}, _Rprop(conditions.damping, most, 0.0 if scalars["k"] else lr, *h.etas, *h.step_sizes)


def _rprop(g: Tensor, z: Tensor, previous: Tensor, size: Tensor, s: _Rprop) -> tuple[Tensor, Tensor, Tensor]:
    size = size + s.added
    # Of the signs, since the product of small gradients underflows.
    agreement = torch.sign(g) * torch.sign(previous)
    size = torch.where(agreement > s.zero, s.grow * size, torch.where(agreement < s.zero, s.shrink * size, size))
    size = torch.clamp(size, s.smallest, s.largest)
    # Where the sign has changed, the point stays, and so does the size in the next step.
    g = torch.where(agreement < s.zero, s.zero * g, g)
    return torch.sign(g) * torch.clamp(s.damping * size, s.zero, s.most), g, size


SGD = Base((), _advance_sgd, _sgd)
SGD_MOMENTUM = Base(("momentum_buffer",), _advance_sgd, _sgd_momentum)
RMSPROP = Base(("square_avg",), _advance_rmsprop, _rmsprop)
RMSPROP_MOMENTUM = Base(("square_avg", "momentum_buffer"), _advance_rmsprop, _rmsprop_momentum)
RMSPROP_CENTERED = Base(("square_avg", "grad_avg"), _advance_rmsprop, _rmsprop_centered)
RMSPROP_CENTERED_MOMENTUM = Base(
    ("square_avg", "grad_avg", "momentum_buffer"), _advance_rmsprop, _rmsprop_centered_momentum
)
ADAGRAD = Base(("sum",), _advance_adagrad, _adagrad)
RPROP = Base(("prev", "step_size"), _advance_rprop, _rprop)


def base_of(h: specs.Base) -> Base:
    """The base that hyperparameters select."""
    match h:
        case specs.BaseSGD():
            return SGD_MOMENTUM if h.momentum else SGD
        case specs.BaseRMSprop(centered=True):
            return RMSPROP_CENTERED_MOMENTUM if h.momentum else RMSPROP_CENTERED
        case specs.BaseRMSprop():
            return RMSPROP_MOMENTUM if h.momentum else RMSPROP
        case specs.BaseAdagrad():
            return ADAGRAD
        case specs.BaseAdam():
            return moments.ADAM_AMSGRAD if h.amsgrad else moments.ADAM
        case specs.BaseAdamW():
            return moments.ADAMW_AMSGRAD if h.amsgrad else moments.ADAMW
        case specs.BaseNAdam():
            return moments.NADAM
        case specs.BaseRAdam():
            return moments.RADAM
        case specs.BaseAdamax():
            return moments.ADAMAX
        case specs.BaseRprop():
            return RPROP
        case specs.MatrixBase():
            return MATRICES
