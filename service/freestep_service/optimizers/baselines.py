"""The baselines: SGD with momentum, and AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in `torch.optim`.

They keep one point, `y`, and x is y.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from freestep.models import SGD as SGDSpec
from freestep.models import AdamW as AdamWSpec
from freestep.models import Schedule
from freestep_service.optimizers.method import Buffers, Method, Scalars

__all__ = ["ADAMW", "SGD"]


def _scheduled(lr: float, schedule: Schedule, k: float) -> float:
    return lr * (k + 1) / schedule.warmup_steps if k < schedule.warmup_steps else lr


class _SGDCoefficients(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float
    gain: float
    """What the gradient is multiplied by on its way into the momentum buffer."""
    nesterov: bool


def _advance_sgd(h: SGDSpec, scalars: Scalars, damping: float) -> tuple[Scalars, _SGDCoefficients]:
    k = scalars["k"]
    lr = damping * _scheduled(h.lr, h.schedule, k)
    # The buffer starts as the first gradient, undampened.
    gain = 1 - h.dampening if k else 1.0
    return {"k": k + 1}, _SGDCoefficients(lr, h.weight_decay, h.momentum, gain, h.nesterov)


def _update_sgd(g: Tensor, buffers: Buffers, coefficients: _SGDCoefficients) -> None:
    y, buffer = buffers["y"], buffers["momentum_buffer"]
    if coefficients.weight_decay:
        g.add_(y, alpha=coefficients.weight_decay)
    direction = g
    if coefficients.momentum:
        buffer.mul_(coefficients.momentum).add_(g, alpha=coefficients.gain)
        direction = g.add_(buffer, alpha=coefficients.momentum) if coefficients.nesterov else buffer
    y.sub_(direction, alpha=coefficients.lr)


class _AdamWCoefficients(NamedTuple):
    shrink: float
    beta1: float
    beta2: float
    root_bias_correction2: float
    eps: float
    step_size: float


def _advance_adamw(h: AdamWSpec, scalars: Scalars, damping: float) -> tuple[Scalars, _AdamWCoefficients]:
    beta1, beta2 = h.betas
    step = scalars["k"] + 1
    lr = damping * _scheduled(h.lr, h.schedule, scalars["k"])
    return {"k": step}, _AdamWCoefficients(
        shrink=1 - lr * h.weight_decay,
        beta1=beta1,
        beta2=beta2,
        root_bias_correction2=(1 - beta2**step) ** 0.5,
        eps=h.eps,
        step_size=lr / (1 - beta1**step),
    )


def _update_adamw(g: Tensor, buffers: Buffers, coefficients: _AdamWCoefficients) -> None:
    y, m, v = buffers["y"], buffers["exp_avg"], buffers["exp_avg_sq"]
    y.mul_(coefficients.shrink)
    m.lerp_(g, 1 - coefficients.beta1)
    v.mul_(coefficients.beta2).addcmul_(g, g, value=1 - coefficients.beta2)
    denominator = v.sqrt().div_(coefficients.root_bias_correction2).add_(coefficients.eps)
    y.addcdiv_(m, denominator, value=-coefficients.step_size)


SGD = Method(("y", "momentum_buffer"), {"k": 0}, _advance_sgd, _update_sgd)
ADAMW = Method(("y", "exp_avg", "exp_avg_sq"), {"k": 0}, _advance_adamw, _update_adamw)
