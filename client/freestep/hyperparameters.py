"""The algorithms that a run may have, and their hyperparameters.

They keep the names and defaults of the `schedulefree` package and of `torch.optim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from freestep.validation import (
    Coefficient,
    Count,
    Epsilon,
    Flag,
    Interpolation,
    NonNegative,
    Positive,
    Power,
    StrictModel,
    fault,
    kinds_of,
    told_by,
)

__all__ = [
    "ALGORITHMS",
    "SGD",
    "AdamW",
    "AdamWScheduleFree",
    "OptimizerSpec",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "Schedule",
]


class _Hyperparameters(StrictModel):
    max_grad_norm: Positive | None = None
    """Each push's gradient is scaled to at most this 2-norm, taken over all parameters of the run."""

    def overruled(self, overrides: Mapping[str, Any]) -> Self:
        """A param group's hyperparameters: these, with its own in their place. Raises ValidationError."""
        for name in ("algorithm", "max_grad_norm"):
            if name in overrides:
                raise fault((name,), f"{name} belongs to the run, not to a group")
        return type(self).model_validate({**self.model_dump(), **overrides})


class _ScheduleFree(_Hyperparameters):
    r: Power = 0.0
    weight_lr_power: Power = 2.0


class SGDScheduleFree(_ScheduleFree):
    """Schedule-Free SGD, arXiv 2405.15682, as `schedulefree.SGDScheduleFree`."""

    algorithm: Literal["sgd_schedule_free"] = "sgd_schedule_free"
    lr: NonNegative = 1.0
    momentum: Interpolation = 0.9
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0


class AdamWScheduleFree(_ScheduleFree):
    """Schedule-Free AdamW, arXiv 2405.15682, as `schedulefree.AdamWScheduleFree`."""

    algorithm: Literal["adamw_schedule_free"] = "adamw_schedule_free"
    lr: NonNegative = 0.0025
    betas: tuple[Interpolation, Coefficient] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0


class RAdamScheduleFree(_ScheduleFree):
    """Schedule-Free RAdam, as `schedulefree.RAdamScheduleFree`; the rectification is arXiv 1908.03265's."""

    algorithm: Literal["radam_schedule_free"] = "radam_schedule_free"
    lr: NonNegative = 0.0025
    betas: tuple[Interpolation, Interpolation] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    silent_sgd_phase: Flag = True


class Schedule(StrictModel):
    """The baselines' learning-rate schedule; constant after a linear warmup."""

    name: Literal["constant"] = "constant"
    warmup_steps: Count = 0


class _Baseline(_Hyperparameters):
    schedule: Schedule = Schedule()


class SGD(_Baseline):
    """Stochastic gradient descent, as `torch.optim.SGD`."""

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


class AdamW(_Baseline):
    """Adam with decoupled weight decay, arXiv 1711.05101, as `torch.optim.AdamW`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: NonNegative = 0.001
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01


_Algorithms = SGDScheduleFree | AdamWScheduleFree | RAdamScheduleFree | SGD | AdamW
OptimizerSpec = Annotated[_Algorithms, Field(discriminator="algorithm"), told_by("algorithm", _Algorithms)]

ALGORITHMS: dict[str, type[_Algorithms]] = kinds_of("algorithm", _Algorithms)
"""Each algorithm's hyperparameters, by its name."""
