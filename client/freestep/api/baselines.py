"""Algorithms with a schedule, as `torch.optim` has them, and DiLoCo's outer optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from freestep.api.algorithm import Hyperparameters
from freestep.api.bases import BaseSGD
from freestep.api.schedules import Averaging, Constant, NoAveraging, Schedule
from freestep.api.validation import Coefficient, Epsilon, Flag, LearningRate, NonNegative, Steps, fault

__all__ = ["SGD", "AdamW", "DiLoCo"]


class _Baseline(Hyperparameters):
    schedule: Schedule = Constant()
    """The learning-rate schedule, `constant` by default."""
    averaging: Averaging = NoAveraging()
    """The average that x is: `none` (x is y), `polyak` or `ema`."""

    def fixed(self) -> dict[str, tuple[Any, str]]:
        why = "the average that has begun is of this kind, and only the decay of `ema` can change: create another run"
        return {**super().fixed(), "averaging": (self.averaging.model_dump(exclude={"decay"}), why)}

    def _state(self) -> dict[str, Any]:
        return {"averaging": self.averaging.name != "none"}


class SGD(BaseSGD, _Baseline):
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`."""


class AdamW(_Baseline):
    """Adam with decoupled weight decay (arXiv 1711.05101), as `torch.optim.AdamW`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: LearningRate = 0.001
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    """Decay rates of the moving averages of the gradient and of its square."""
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay: the parameter is multiplied by 1 - lr · weight_decay."""


class DiLoCo(Hyperparameters):
    """The outer optimizer of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum along pseudo-gradients.

    A worker's pseudo-gradient is y where its local steps began, minus the parameters where they ended.
    """

    algorithm: Literal["diloco"] = "diloco"
    lr: LearningRate = 0.7
    momentum: Coefficient = 0.9
    """How much of the momentum buffer is kept in a step."""
    nesterov: Flag = True
    """Whether to use Nesterov momentum."""
    momentum_period: Steps = 1
    """N of Delayed Nesterov (arXiv 2401.09135): the momentum changes every N steps, by the mean of their gradients."""
    momentum_activation: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    """c of Delayed Nesterov: the fraction of the momentum in each of the steps between; at most 1/N."""

    @model_validator(mode="after")
    def _delays_nesterov_momentum(self) -> Self:
        if self.momentum_period > 1 and not self.nesterov:
            raise fault(("momentum_period",), "needs Nesterov momentum: set nesterov to true")
        if self.momentum_activation * self.momentum_period > 1:
            raise fault(("momentum_activation",), "must be at most 1 / momentum_period")
        return self

    def fixed(self) -> dict[str, tuple[Any, str]]:
        return {"momentum_period": (self.momentum_period, "the gradients of a period are being gathered: it stays")}

    def _state(self) -> dict[str, Any]:
        return {"momentum_period": self.momentum_period > 1}
