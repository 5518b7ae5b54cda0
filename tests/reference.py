"""Schedule-Free, read off the paper (arXiv 2405.15682, equations 9 to 11) and computed in fp64, one tensor a point.

    y_t = (1 - β) z_t + β x_t        z_{t+1} = z_t - γ d(y_t)        x_{t+1} = (1 - c) x_t + c z_{t+1}

All three points are kept, so that nothing of how the service keeps two of them is shared with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ScheduleFree:
    """One param group's points from its initial weights.

    `adaptive` divides by the root of v, as AdamW does; `rectified` does so as RAdam (arXiv 1908.03265) once the
    variance of that root is finite, and until then follows the gradient, or nothing where `silent_sgd_phase`.
    """

    x: Tensor
    lr: float
    beta: float
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    adaptive: bool = False
    rectified: bool = False
    silent_sgd_phase: bool = True
    k: int = 0
    weight_sum: float = 0.0
    lr_max: float = 0.0
    z: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.x.double().clone()
        self.z = self.x.clone()
        self.v = torch.zeros_like(self.x)

    @property
    def y(self) -> Tensor:
        return (1 - self.beta) * self.z + self.beta * self.x

    def step(self, gradient: Tensor, damping: float = 1.0) -> None:
        """One step along a gradient taken at y; `damping` multiplies the learning rate of z alone."""
        y, g = self.y, gradient.double()
        lr = self.lr * min(1.0, (self.k + 1) / self.warmup_steps) if self.warmup_steps else self.lr
        d = g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        rectification = self.rectification() if self.rectified else 1.0
        if rectification is None:
            lr = 0.0 if self.silent_sgd_phase else lr
        elif self.adaptive or self.rectified:
            lr *= rectification
            d = g / ((self.v / (1 - self.beta2 ** (self.k + 1))).sqrt() + self.eps)
        d = d + self.weight_decay * y
        self.lr_max = max(self.lr_max, lr)
        weight = (self.k + 1) ** self.r * self.lr_max**self.weight_lr_power
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum else 0.0
        self.z = self.z - damping * lr * d
        self.x = (1 - c) * self.x + c * self.z
        self.k += 1

    def rectification(self) -> float | None:
        """RAdam's r_t of this step; None while the variance is not finite."""
        t, limit = self.k + 1, 2 / (1 - self.beta2) - 1
        rho = limit - 2 * t * self.beta2**t / (1 - self.beta2**t)
        if rho <= 4:
            return None
        return float(((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5)
