"""The base optimizers of `schedule_free_wrapper`: elementwise ones of `torch.optim`, and Muon and NorMuon for matrices.

Hyperparameters have torch's names and defaults, and NorMuon's those of its paper. Those that do not change the result
(foreach, fused, capturable, differentiable) are left out, and so is maximize: negate the loss.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from freestep.api.validation import (
    Coefficient,
    Epsilon,
    Flag,
    LearningRate,
    NonNegative,
    StrictModel,
    fault,
    told_by,
)

__all__ = [
    "Base",
    "BaseAdagrad",
    "BaseAdam",
    "BaseAdamW",
    "BaseAdamax",
    "BaseMuon",
    "BaseNAdam",
    "BaseNorMuon",
    "BaseRAdam",
    "BaseRMSprop",
    "BaseRprop",
    "BaseSGD",
    "MatrixBase",
]

_Betas = Annotated[
    tuple[Coefficient, Coefficient],
    Field(description="Decay rates of the moving averages of the gradient and of its square."),
]
_L2 = Annotated[NonNegative, Field(description="L2 penalty: weight_decay · parameter is added to the gradient.")]
_Decoupled = Annotated[
    NonNegative, Field(description="Decoupled weight decay: the parameter is multiplied by 1 - lr · weight_decay.")
]
_DecoupledFlag = Annotated[Flag, Field(description="Whether the weight decay is decoupled, as in AdamW.")]
_AMSGrad = Annotated[
    Flag, Field(description="Whether to divide by the largest moving average of squares so far (AMSGrad).")
]
_Number = Annotated[float, Field(strict=True, ge=-100, le=100)]
_TRIED = 64
"""Singular values in (0, 1] that Newton-Schulz coefficients are tried on."""
_LARGEST_SINGULAR_VALUE = 10


class BaseSGD(StrictModel):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`."""

    algorithm: Literal["sgd"] = "sgd"
    lr: LearningRate = 0.001
    momentum: Coefficient = 0.0
    """How much of the momentum buffer is kept in a step."""
    dampening: NonNegative = 0.0
    """The gradient enters the momentum buffer times 1 - dampening."""
    weight_decay: _L2 = 0.0
    nesterov: Flag = False
    """Whether to use Nesterov momentum; needs momentum above 0 and dampening 0."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise fault(("nesterov",), "Nesterov momentum needs momentum above 0 and dampening 0")
        return self


class BaseRMSprop(StrictModel):
    """RMSprop, as `torch.optim.RMSprop`."""

    algorithm: Literal["rmsprop"] = "rmsprop"
    lr: LearningRate = 0.01
    alpha: Coefficient = 0.99
    """Decay rate of the moving average of squares."""
    eps: Epsilon = 1e-8
    weight_decay: _L2 = 0.0
    momentum: Coefficient = 0.0
    """How much of the momentum buffer is kept in a step."""
    centered: Flag = False
    """Whether to divide by an estimate of the standard deviation, not of the root mean square."""


class BaseAdagrad(StrictModel):
    """Adagrad, as `torch.optim.Adagrad`."""

    algorithm: Literal["adagrad"] = "adagrad"
    lr: LearningRate = 0.01
    lr_decay: NonNegative = 0.0
    """At step k, counted from 0, the learning rate is lr / (1 + k · lr_decay)."""
    weight_decay: _L2 = 0.0
    initial_accumulator_value: NonNegative = 0.0
    """Where the sum of squares begins."""
    eps: Epsilon = 1e-10


class BaseAdam(StrictModel):
    """Adam (arXiv 1412.6980), as `torch.optim.Adam`."""

    algorithm: Literal["adam"] = "adam"
    lr: LearningRate = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """L2 penalty, or decoupled weight decay if decoupled_weight_decay is set."""
    amsgrad: _AMSGrad = False
    decoupled_weight_decay: _DecoupledFlag = False


class BaseAdamW(StrictModel):
    """Adam with decoupled weight decay (arXiv 1711.05101), as `torch.optim.AdamW`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: LearningRate = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: _Decoupled = 0.01
    amsgrad: _AMSGrad = False


class BaseNAdam(StrictModel):
    """Adam with Nesterov momentum, as `torch.optim.NAdam`."""

    algorithm: Literal["nadam"] = "nadam"
    lr: LearningRate = 0.002
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """L2 penalty, or decoupled weight decay if decoupled_weight_decay is set."""
    momentum_decay: NonNegative = 0.004
    """ψ of torch's momentum schedule: at step t, counted from 1, the momentum is beta1 · (1 - 0.96^(t · ψ) / 2)."""
    decoupled_weight_decay: _DecoupledFlag = False


class BaseRAdam(StrictModel):
    """Rectified Adam (arXiv 1908.03265), as `torch.optim.RAdam`."""

    algorithm: Literal["radam"] = "radam"
    lr: LearningRate = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """L2 penalty, or decoupled weight decay if decoupled_weight_decay is set."""
    decoupled_weight_decay: _DecoupledFlag = False


class BaseAdamax(StrictModel):
    """Adam with the infinity norm (arXiv 1412.6980, section 7), as `torch.optim.Adamax`."""

    algorithm: Literal["adamax"] = "adamax"
    lr: LearningRate = 0.002
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: _L2 = 0.0


class BaseRprop(StrictModel):
    """Steps by the gradient's sign, whose size grows while the sign stays the same, as `torch.optim.Rprop`."""

    algorithm: Literal["rprop"] = "rprop"
    lr: NonNegative = 0.01
    """The size of the first step."""
    etas: tuple[
        Annotated[float, Field(strict=True, gt=0, lt=1)],
        Annotated[float, Field(strict=True, gt=1, le=1e12)],
    ] = (0.5, 1.2)
    """The factors of the step size where the sign has changed, and where it has not."""
    step_sizes: tuple[NonNegative, NonNegative] = (1e-6, 50.0)
    """The smallest and the largest step size."""

    @model_validator(mode="after")
    def _smallest_first(self) -> Self:
        if self.step_sizes[0] > self.step_sizes[1]:
            raise fault(("step_sizes",), "the smallest step size comes first")
        return self


@lru_cache
def _keeps_small(coefficients: tuple[float, float, float], steps: int) -> bool:
    """True if Newton-Schulz iterations keep singular values in (0, 1] small; cached, since specs have many groups."""
    a, b, c = coefficients
    for number in range(1, _TRIED + 1):
        sigma = number / _TRIED
        for _ in range(steps):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
            if abs(sigma) > _LARGEST_SINGULAR_VALUE:
                return False
    return True


class MatrixBase(StrictModel):
    """A base that steps along the orthogonal factor of a matrix's momentum, by Newton-Schulz iterations.

    It takes parameters of two dimensions only, and whole ones: shards do not divide them. Other parameters must be in a
    param group with the base `adamw`.
    """

    lr: LearningRate = 0.001
    weight_decay: _Decoupled = 0.1
    momentum: Coefficient = 0.95
    """How much of the momentum buffer is kept in a step."""
    eps: Annotated[Epsilon, Field(description="The least norm that a matrix is divided by before the iterations.")] = (
        1e-7
    )
    ns_coefficients: tuple[_Number, _Number, _Number] = (3.4445, -4.775, 2.0315)
    """a, b and c of the iteration X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X."""
    ns_steps: Annotated[int, Field(strict=True, ge=1, le=99)] = 5
    """How many iterations are made."""

    @model_validator(mode="after")
    def _keeps_singular_values_small(self) -> Self:
        if not _keeps_small(self.ns_coefficients, self.ns_steps):
            raise fault(("ns_coefficients",), f"make singular values above {_LARGEST_SINGULAR_VALUE}")
        return self


class BaseMuon(MatrixBase):
    """Muon, as `torch.optim.Muon`."""

    algorithm: Literal["muon"] = "muon"
    nesterov: Flag = True
    """Whether to use Nesterov momentum."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """The factor of lr for a matrix: sqrt(max(1, rows / columns)) for None and "original", or 0.2 sqrt(max(rows,
    columns)) for "match_rms_adamw", which gives steps of the size of AdamW's."""


class BaseNorMuon(MatrixBase):
    """NorMuon (arXiv 2510.05491): Muon whose rows are divided by the root of a moving average of their mean squares.

    Under Schedule-Free it is SF-NorMuon, arXiv 2605.23061.
    """

    algorithm: Literal["normuon"] = "normuon"
    weight_decay: _Decoupled = 0.0
    beta2: Coefficient = 0.95
    """Decay rate of the moving average of the rows' mean squares."""


_Bases = (
    BaseSGD
    | BaseRMSprop
    | BaseAdagrad
    | BaseAdam
    | BaseAdamW
    | BaseNAdam
    | BaseRAdam
    | BaseAdamax
    | BaseRprop
    | BaseMuon
    | BaseNorMuon
)
Base = Annotated[
    _Bases,
    Field(discriminator="algorithm", json_schema_extra={"required": ["algorithm"]}),
    told_by("algorithm", _Bases),
]
