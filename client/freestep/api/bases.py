"""The base optimizers that `schedule_free_wrapper` wraps: the elementwise ones of `torch.optim`, and those of matrices.

Hyperparameters are torch's own, with its defaults, and of NorMuon its paper's. Left out are those that say how and not
what is computed (foreach, fused, capturable, differentiable), and maximize, which is the sign of a worker's loss.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from freestep.api.validation import Coefficient, Epsilon, Flag, NonNegative, StrictModel, fault, told_by

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

_Betas = tuple[Coefficient, Coefficient]
_Number = Annotated[float, Field(strict=True, ge=-100, le=100)]
_TRIED = 64
"""Singular values in (0, 1] that Newton-Schulz coefficients are tried on."""
_LARGEST_SINGULAR_VALUE = 10


class BaseSGD(StrictModel):
    """What `torch.optim.SGD` takes; as a run's own method, too."""

    algorithm: Literal["sgd"] = "sgd"
    lr: NonNegative = 0.001
    momentum: Coefficient = 0.0
    dampening: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: Flag = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise fault(("nesterov",), "Nesterov momentum needs momentum above 0 and dampening 0")
        return self


class BaseRMSprop(StrictModel):
    algorithm: Literal["rmsprop"] = "rmsprop"
    lr: NonNegative = 0.01
    alpha: Coefficient = 0.99
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    momentum: Coefficient = 0.0
    centered: Flag = False


class BaseAdagrad(StrictModel):
    algorithm: Literal["adagrad"] = "adagrad"
    lr: NonNegative = 0.01
    lr_decay: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: Epsilon = 1e-10


class BaseAdam(StrictModel):
    algorithm: Literal["adam"] = "adam"
    lr: NonNegative = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    amsgrad: Flag = False
    decoupled_weight_decay: Flag = False


class BaseAdamW(StrictModel):
    algorithm: Literal["adamw"] = "adamw"
    lr: NonNegative = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01
    amsgrad: Flag = False


class BaseNAdam(StrictModel):
    algorithm: Literal["nadam"] = "nadam"
    lr: NonNegative = 0.002
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: Flag = False


class BaseRAdam(StrictModel):
    algorithm: Literal["radam"] = "radam"
    lr: NonNegative = 0.001
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    decoupled_weight_decay: Flag = False


class BaseAdamax(StrictModel):
    algorithm: Literal["adamax"] = "adamax"
    lr: NonNegative = 0.002
    betas: _Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0


class BaseRprop(StrictModel):
    """Steps by the gradient's sign alone: `lr` is how far the first one goes."""

    algorithm: Literal["rprop"] = "rprop"
    lr: NonNegative = 0.01
    etas: tuple[
        Annotated[float, Field(strict=True, gt=0, lt=1)],
        Annotated[float, Field(strict=True, gt=1, le=1e12)],
    ] = (0.5, 1.2)
    step_sizes: tuple[NonNegative, NonNegative] = (1e-6, 50.0)

    @model_validator(mode="after")
    def _smallest_first(self) -> Self:
        if self.step_sizes[0] > self.step_sizes[1]:
            raise fault(("step_sizes",), "the smallest step size comes first")
        return self


@lru_cache
def _keeps_small(coefficients: tuple[float, float, float], steps: int) -> bool:
    """Whether the iterations leave singular values small, tried on some of a matrix that was divided by its norm.

    A spec is validated once for each of its groups.
    """
    a, b, c = coefficients
    for number in range(1, _TRIED + 1):
        sigma = number / _TRIED
        for _ in range(steps):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
            if abs(sigma) > _LARGEST_SINGULAR_VALUE:
                return False
    return True


class MatrixBase(StrictModel):
    """What steps along a matrix's gradient made orthogonal by Newton-Schulz iterations.

    Such a base takes whole matrices, parameters of two dimensions; groups of other parameters have the base `adamw`.
    """

    lr: NonNegative = 0.001
    weight_decay: NonNegative = 0.1
    momentum: Coefficient = 0.95
    eps: Epsilon = 1e-7
    ns_coefficients: tuple[_Number, _Number, _Number] = (3.4445, -4.775, 2.0315)
    """a, b and c of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X."""
    ns_steps: Annotated[int, Field(strict=True, ge=1, le=99)] = 5

    @model_validator(mode="after")
    def _keeps_singular_values_small(self) -> Self:
        if not _keeps_small(self.ns_coefficients, self.ns_steps):
            raise fault(("ns_coefficients",), f"make singular values above {_LARGEST_SINGULAR_VALUE}")
        return self


class BaseMuon(MatrixBase):
    """What `torch.optim.Muon` takes."""

    algorithm: Literal["muon"] = "muon"
    nesterov: Flag = True
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """lr is multiplied by sqrt(max(1, rows / columns)), which is the original, or by 0.2 sqrt(max(rows, columns))."""


class BaseNorMuon(MatrixBase):
    """Muon whose rows are scaled by the root of their mean squares' moving average, arXiv 2510.05491.

    Over it Schedule-Free is SF-NorMuon, arXiv 2605.23061.
    """

    algorithm: Literal["normuon"] = "normuon"
    weight_decay: NonNegative = 0.0
    beta2: Coefficient = 0.95


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
Base = Annotated[_Bases, Field(discriminator="algorithm"), told_by("algorithm", _Bases)]
