"""Schedule-Free, read off the paper (arXiv 2405.15682, equations 9 to 11) and computed in fp64, one tensor a point.

    y_t = (1 - β) z_t + β x_t        z_{t+1} = z_t - γ d(y_t)        x_{t+1} = (1 - c) x_t + c z_{t+1}

All three points are kept, so that nothing of how the service keeps two of them is shared with it.

A step may be told of an expected staleness τ̂. It then makes its y with a β of its own, and takes a part of γ:

    u = 1 - β₀ if τ̂ = 0 else min(0.3, max((1 - β₀) / (1 + τ̂), 2 τ̂ c_prev))
    y_{t+1} = u z_{t+1} + (1 - u) x_{t+1}        γ min(1, max(0.2, 1 - β₀) / ((1 + τ̂) u))

with β₀ the user's, and c_prev the c of the step before, 1 until there was one. c is of the user's γ. Ahead of x, it is

    u = min(0.3, 1 - β₀ + 1.5 τ̂ c_prev)        γ min(1, 0.3 / ((1 + τ̂) u))

Before a step with
another τ̂ than the one before had, z goes from where it is along the line through x to where y, with the new u, stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, Rprop


def fadas(lr: float, staleness: int, threshold: int) -> float:
    """FADAS's learning rate under delay (arXiv 2407.18365): η where τ <= τ_c, else min(η, 1/τ)."""
    return lr if staleness <= threshold else min(lr, 1 / staleness)


@dataclass(kw_only=True)
class Delayed:
    """The share of x in y, as steps leave it."""

    beta: float
    is_ahead: bool = False
    share: float = field(init=False)
    """β of the y that there is."""
    c: float = 1.0
    """Of the step before."""
    staleness: float = 0.0
    """Expected in the step before."""

    def __post_init__(self) -> None:
        self.share = self.beta

    def u(self, staleness: float) -> float:
        if staleness == 0:
            return 1 - self.beta
        if self.is_ahead:
            return min(0.3, 1 - self.beta + 1.5 * staleness * self.c)
        return min(0.3, max((1 - self.beta) / (1 + staleness), 2 * staleness * self.c))

    def expect(self, staleness: float) -> tuple[float, float]:
        """Takes the next y's β; returns what is left of γ, and by how much z gets farther from x."""
        farther = self.u(self.staleness) / self.u(staleness)
        self.share, self.staleness = 1 - self.u(staleness), staleness
        most = 0.3 if self.is_ahead else max(0.2, 1 - self.beta)
        left = min(1.0, most / ((1 + staleness) * self.u(staleness))) if staleness else 1.0
        return left, farther


@dataclass
class ScheduleFree(Delayed):
    """One param group's points from its initial weights.

    `adaptive` divides by the root of v, as AdamW does; `rectified` does so as RAdam (arXiv 1908.03265) once the
    variance of that root is finite, and until then follows the gradient, or nothing where `silent_sgd_phase`.
    `inner_momentum` is Adam's own. `averaging_constant` is C of arXiv 2507.09846: c becomes min((1 - β) C c, 1).
    """

    x: Tensor
    lr: float
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    adaptive: bool = False
    rectified: bool = False
    silent_sgd_phase: bool = True
    decay_at_z: bool = False
    inner_momentum: float = 0.0
    averaging_constant: float | None = None
    k: int = 0
    weight_sum: float = 0.0
    lr_max: float = 0.0
    z: Tensor = field(init=False)
    v: Tensor = field(init=False)
    m: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x = self.x.double().clone()
        self.z = self.x.clone()
        self.v = torch.zeros_like(self.x)
        self.m = torch.zeros_like(self.x)

    @property
    def y(self) -> Tensor:
        return (1 - self.share) * self.z + self.share * self.x

    def step(self, gradient: Tensor, damping: float = 1.0, staleness: float = 0.0) -> None:
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
            self.m = self.inner_momentum * self.m + (1 - self.inner_momentum) * g
            m = self.m / (1 - self.inner_momentum ** (self.k + 1))
            d = m / ((self.v / (1 - self.beta2 ** (self.k + 1))).sqrt() + self.eps)
        d = d + self.weight_decay * (self.z if self.decay_at_z else y)
        self.lr_max = max(self.lr_max, lr)
        weight = (self.k + 1) ** self.r * self.lr_max**self.weight_lr_power
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum else 0.0
        if self.averaging_constant is not None:
            c = min((1 - self.beta) * self.averaging_constant * c, 1.0)
        left, farther = self.expect(staleness)
        self.z = self.x + farther * (self.z - self.x) - damping * left * lr * d
        self.x = (1 - c) * self.x + c * self.z
        self.c = c if self.weight_sum else 1.0
        self.k += 1

    def rectification(self) -> float | None:
        """RAdam's r_t of this step; None while the variance is not finite."""
        t, limit = self.k + 1, 2 / (1 - self.beta2) - 1
        rho = limit - 2 * t * self.beta2**t / (1 - self.beta2**t)
        if rho <= 4:
            return None
        return float(((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5)


@dataclass
class OverTorch(Delayed):
    """The same over an optimizer of torch's, made by `base` for a parameter in fp64, which is z.

    `decay_at_y` takes lr · decay_at_y · y off z before the optimizer's step. Where `mu_x` is given c is 1 - mu_x, which
    is generalized primal averaging (arXiv 2512.17131), with β = μ_y.
    """

    x: Tensor
    base: Callable[[list[nn.Parameter]], Optimizer]
    decay_at_y: float = 0.0
    r: float = 0.0
    weight_lr_power: float = 2.0
    averaging_constant: float | None = None
    mu_x: float | None = None
    k: int = 0
    weight_sum: float = 0.0
    lr_max: float = 0.0
    parameter: nn.Parameter = field(init=False)
    optimizer: Optimizer = field(init=False)
    lr: float = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x = self.x.double().clone()
        self.parameter = nn.Parameter(self.x.clone())
        self.optimizer = self.base([self.parameter])
        self.lr = self.optimizer.param_groups[0]["lr"]

    @property
    def z(self) -> Tensor:
        return self.parameter.detach()

    @property
    def y(self) -> Tensor:
        return (1 - self.share) * self.z + self.share * self.x

    def step(self, gradient: Tensor, damping: float = 1.0, staleness: float = 0.0) -> None:
        """One step along a gradient taken at y; `damping` multiplies the learning rate of z alone."""
        y, at_first = self.y, self.z.clone()
        left, farther = self.expect(staleness)
        damping *= left
        self.z.sub_(damping * self.lr * self.decay_at_y * y)
        before = self.z.clone()
        self.parameter.grad = gradient.double()
        (group,) = self.optimizer.param_groups
        group["lr"] = self.lr * damping
        if isinstance(self.optimizer, Rprop) and not self.k:
            # Its learning rate is where its step sizes start.
            group["lr"] = self.lr
        with _doubles():
            self.optimizer.step()
        if isinstance(self.optimizer, Rprop):
            self.z.copy_(before + damping * (self.z - before))
        self.z.add_((farther - 1) * (at_first - self.x))
        self.x = (1 - (c := self._weight())) * self.x + c * self.z
        self.c = c if self.weight_sum else 1.0
        self.k += 1

    def _weight(self) -> float:
        """c of this step."""
        if self.mu_x is not None:
            return 1 - self.mu_x
        self.lr_max = max(self.lr_max, self.lr)
        weight = (self.k + 1) ** self.r * self.lr_max**self.weight_lr_power
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum else 0.0
        return c if self.averaging_constant is None else min((1 - self.beta) * self.averaging_constant * c, 1.0)


@dataclass
class AdamCPlus:
    """ScheduleFree+ (arXiv 2605.19095, Algorithm 1), of all tensors of a model, since its step size is of all of them.

        e_t = β_p ê_{t-1} + (1 - β_p) sqrt(π/2) |g_t|_1       ê_t = e_t / (1 - β_p^t)
        I_t = β̃_t <g_t, z_{t-1} - x_{t-1}>                    η_t = γ_t max(0, F_t + I_t) / ê_t
        z_t = z_{t-1} - η_t² λ y_{t-1} - η_t m̂_t / (sqrt(v̂_t) + eps)
        x_t = (1 - c_t) x_{t-1} + c_t z_t                     y_t = β̃_t x_t + (1 - β̃_t) z_t

    The paper was not at hand: this follows what is published of its equations, and where those are silent the author's
    `AdamCScheduleFreePlusPaper` (github.com/facebookresearch/schedule_free): β̃_t, with log(1 - β̃) going on a straight
    line over steps counted from 0; c_t, Schedule-Free's with the weights t^r η_max^p, η_max at least eps, and 1 in the
    first c_warmup steps; and ê, which that code keeps in e's place, where the equations keep e. Ours
    alone are the warmup of γ, the damping of η, and η = 0 where all gradients have been 0.
    """

    x: dict[str, Tensor]
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    sf_beta1: float = 0.9
    sf_beta1_anneal_steps: int = 0
    sf_beta1_max: float = 0.965
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    c_warmup: int = 0
    polyak_beta: float = 0.0
    r: float = 0.0
    weight_lr_power: float = 2.0
    t: int = 0
    e: float = 0.0
    lr_max: float = 0.0
    weight_sum: float = 0.0

    def __post_init__(self) -> None:
        self.x = {name: tensor.double().clone() for name, tensor in self.x.items()}
        self.z, self.y = dict(self.x), dict(self.x)
        self.m, self.v = ({name: torch.zeros_like(x) for name, x in self.x.items()} for _ in range(2))

    def step(self, gradients: dict[str, Tensor], loss: float, damping: float = 1.0) -> None:
        """One step along gradients taken at y, where the loss was `loss`."""
        self.t += 1
        beta = self.sf_beta1
        if self.sf_beta1_anneal_steps:
            share = min((self.t - 1) / self.sf_beta1_anneal_steps, 1.0)
            beta = 1 - math.exp((1 - share) * math.log(1 - beta) + share * math.log(1 - self.sf_beta1_max))
        g = {name: gradient.double() for name, gradient in gradients.items()}
        norm = sum(float(each.abs().sum()) for each in g.values())
        inner = sum(float((g[name] * (self.z[name] - self.x[name])).sum()) for name in g)
        average = self.polyak_beta * self.e + (1 - self.polyak_beta) * math.sqrt(math.pi / 2) * norm
        self.e = average / (1 - self.polyak_beta**self.t)
        lr = self.lr * min(1.0, self.t / self.warmup_steps) if self.warmup_steps else self.lr
        eta = lr * max(0.0, loss + beta * inner) / self.e if self.e else 0.0
        self.lr_max = max(self.lr_max, eta, self.eps)
        c = 1.0
        if self.t > self.c_warmup:
            weight = self.t**self.r * self.lr_max**self.weight_lr_power
            self.weight_sum += weight
            c = weight / self.weight_sum
        eta *= damping
        for name, each in g.items():
            self.m[name] = self.betas[0] * self.m[name] + (1 - self.betas[0]) * each
            self.v[name] = self.betas[1] * self.v[name] + (1 - self.betas[1]) * each * each
            m = self.m[name] / (1 - self.betas[0] ** self.t)
            v = self.v[name] / (1 - self.betas[1] ** self.t)
            z = self.z[name] - eta * eta * self.weight_decay * self.y[name]
            self.z[name] = z - eta * m / (v.sqrt() + self.eps)
            self.x[name] = (1 - c) * self.x[name] + c * self.z[name]
            self.y[name] = beta * self.x[name] + (1 - beta) * self.z[name]


@dataclass
class DelayedNesterov:
    """The outer optimizer of DiLoCo (arXiv 2311.08105), and Delayed Nesterov (arXiv 2401.09135, section 5).

    Step t receives g and has Δ <- Δ + g. Where t + 1 is a multiple of N = `period`

        m <- β m + Δ/N        θ <- θ - ε ((1 - c N + c) β m + g/N)        Δ <- 0

    else m stays, and θ <- θ - ε (c β m + g/N); with β = `momentum`, c = `activation`.
    """

    y: Tensor
    lr: float = 0.7
    momentum: float = 0.9
    period: int = 1
    activation: float = 0.0
    t: int = 0
    m: Tensor = field(init=False)
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.y = self.y.double().clone()
        self.m = torch.zeros_like(self.y)
        self.total = torch.zeros_like(self.y)

    def step(self, gradient: Tensor, damping: float = 1.0) -> None:
        """One step; `damping` multiplies the learning rate."""
        g = gradient.double()
        self.total += g
        share = self.activation
        if (self.t + 1) % self.period == 0:
            self.m = self.momentum * self.m + self.total / self.period
            self.total = torch.zeros_like(g)
            share = 1 - self.activation * self.period + self.activation
        self.y = self.y - damping * self.lr * (share * self.momentum * self.m + g / self.period)
        self.t += 1


@contextmanager
def _doubles() -> Iterator[None]:
    """Has torch keep scalars in fp64, such as NAdam's product of momenta."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Muon(Optimizer):
    """Muon in fp64 (arXiv 2502.16982, algorithm 1), by torch.optim.Muon's names and definition of momentum.

    Where `beta2` is given it is NorMuon (arXiv 2510.05491, algorithm 1; over it Schedule-Free is SF-NorMuon, arXiv
    2605.23061): rows divided by the root of their mean squares' average, the whole with a root mean square of 0.2.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        beta2: float | None = None,
        adjust_lr_fn: str | None = None,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(params, {"lr": lr})
        (self.parameter,) = params
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.beta2, self.adjust_lr_fn, self.eps = beta2, adjust_lr_fn, eps
        self.m = torch.zeros_like(self.parameter)
        self.row_squares = torch.zeros_like(self.parameter[:, 0])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        g, lr = self.parameter.grad, self.param_groups[0]["lr"]
        assert g is not None
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        rows, columns = g.shape
        if self.beta2 is None:
            p = self.polar(self.momentum * self.m + (1 - self.momentum) * g if self.nesterov else self.m)
            by_rms = self.adjust_lr_fn == "match_rms_adamw"
            p = p * (0.2 * max(rows, columns) ** 0.5 if by_rms else max(1.0, rows / columns) ** 0.5)
        else:
            p = self.polar(self.m)
            self.row_squares = self.beta2 * self.row_squares + (1 - self.beta2) * p.square().mean(1)
            p = p / (self.row_squares.sqrt() + self.eps)[:, None]
            p = 0.2 * p / p.square().mean().sqrt()
        self.parameter.copy_((1 - lr * self.weight_decay) * self.parameter - lr * p)

    def polar(self, m: Tensor) -> Tensor:
        """Five iterations of the odd polynomial, taken on the singular values themselves."""
        u, sigma, vh = torch.linalg.svd(m / m.norm(), full_matrices=False)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
        return u @ sigma.diag() @ vh
