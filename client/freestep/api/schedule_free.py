"""The Schedule-Free algorithms (arXiv 2405.15682), with the names and defaults of the `schedulefree` package.

At step k from 0, with β the interpolation of x in y:

    γ_k = lr · min(1, (k+1) / warmup_steps)     w = (k+1)^r · max(γ_0..γ_k)^weight_lr_power     c = w / Σ w
    z <- z - γ_k · d                            x <- (1-c) x + c z                              y = (1-β) z + β x

where d is the base optimizer's direction, of the gradient at y.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from freestep.api.algorithm import Hyperparameters
from freestep.api.bases import Base, BaseAdamW, MatrixBase
from freestep.api.delay import Ahead, DelayCorrection, NoCorrection
from freestep.api.validation import (
    Coefficient,
    Epsilon,
    Flag,
    Interpolation,
    LearningRate,
    NonNegative,
    Power,
    WarmupSteps,
    fault,
)

__all__ = [
    "LEAST_CORRECTED",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "ScheduleFree",
    "ScheduleFreeWrapper",
]

LEAST_CORRECTED = 0.7
"""The least β for which stale gradients can be corrected for: the correction never makes β smaller."""

_AveragingPower = Annotated[Power, Field(description="The power of k+1 in the weight of step k in the average.")]
_LearningRatePower = Annotated[
    Power, Field(description="The power of the largest learning rate so far in the weight of a step in the average.")
]


class ScheduleFree(Hyperparameters):
    """What the Schedule-Free algorithms have in common."""

    of_the_run = ("delay_correction",)

    r: _AveragingPower = 0.0
    weight_lr_power: _LearningRatePower = 2.0
    averaging_constant: Annotated[float, Field(strict=True, gt=0, le=1e12)] | None = None
    """C of arXiv 2507.09846: the newest z weighs min(c · (1 - β) · C, 1) in the average; None is c."""
    delay_correction: DelayCorrection | None = None
    """The correction for stale gradients: `none`, `auto`, `constant` or `ahead`. None is `auto` if the run's policy
    admits stale gradients and every group's β is at least 0.7, else `none`."""

    @property
    @abstractmethod
    def beta(self) -> float:
        """β, the interpolation of x in y."""

    def fixed(self) -> dict[str, tuple[Any, str]]:
        why = "to or from 'ahead', y would jump: create another run"
        return {**super().fixed(), "delay_correction": (isinstance(self.delay_correction, Ahead), why)}

    @model_validator(mode="after")
    def _corrects_large_betas_only(self) -> Self:
        given = self.delay_correction
        if given is not None and not isinstance(given, NoCorrection) and self.beta < LEAST_CORRECTED:
            raise fault(
                ("delay_correction",), f"needs β of at least {LEAST_CORRECTED}, and it is {self.beta:g}: use 'none'"
            )
        return self


class SGDScheduleFree(ScheduleFree):
    """Schedule-Free SGD (arXiv 2405.15682), as `schedulefree.SGDScheduleFree`."""

    algorithm: Literal["sgd_schedule_free"] = "sgd_schedule_free"
    lr: LearningRate = 1.0
    momentum: Interpolation = 0.9
    """β, the interpolation of x in y."""
    weight_decay: NonNegative = 0.0
    """Weight decay at y: weight_decay · y is added to the gradient."""
    warmup_steps: WarmupSteps = 0

    @property
    def beta(self) -> float:
        return self.momentum


class AdamWScheduleFree(ScheduleFree):
    """Schedule-Free AdamW (arXiv 2405.15682), as `schedulefree.AdamWScheduleFree`."""

    algorithm: Literal["adamw_schedule_free"] = "adamw_schedule_free"
    lr: LearningRate = 0.0025
    betas: tuple[Interpolation, Coefficient] = (0.9, 0.999)
    """β, the interpolation of x in y; and the decay rate of the moving average of squared gradients."""
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay: weight_decay · y is added to the normalized gradient."""
    warmup_steps: WarmupSteps = 0
    decay_at_z: Flag = False
    """Whether weight decay is at z and not at y, as in `schedulefree.AdamWScheduleFreeReference`."""
    inner_momentum: Coefficient = 0.0
    """Decay rate of Adam's moving average of gradients; 0 leaves it out, and its vector."""

    @property
    def beta(self) -> float:
        return self.betas[0]

    def _state(self) -> dict[str, Any]:
        return {"inner_momentum": self.inner_momentum > 0}


class RAdamScheduleFree(ScheduleFree):
    """Schedule-Free RAdam, as `schedulefree.RAdamScheduleFree`; the rectification is that of arXiv 1908.03265."""

    algorithm: Literal["radam_schedule_free"] = "radam_schedule_free"
    lr: LearningRate = 0.0025
    betas: tuple[Interpolation, Interpolation] = (0.9, 0.999)
    """β, the interpolation of x in y; and the decay rate of the moving average of squared gradients."""
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay: weight_decay · y is added to the normalized gradient."""
    silent_sgd_phase: Flag = True
    """Whether the first steps, for which the rectification is not defined, are skipped; else they are SGD steps."""

    @property
    def beta(self) -> float:
        return self.betas[0]


class ScheduleFreeWrapper(ScheduleFree):
    """Schedule-Free over another optimizer, as `schedulefree.ScheduleFreeWrapper`.

    The base has the learning rate, and its own weight decay is at z. A param group may change members of the base one
    by one; beside groups with `muon` or `normuon`, others may have the base `adamw`.
    """

    algorithm: Literal["schedule_free_wrapper"] = "schedule_free_wrapper"
    base: Base
    """The base optimizer: an elementwise one of `torch.optim` (`sgd`, `rmsprop`, `adagrad`, `adam`, `adamw`, `nadam`,
    `radam`, `adamax`, `rprop`), or `muon` or `normuon` for matrices, with its hyperparameters."""
    momentum: Interpolation = 0.9
    """β, the interpolation of x in y."""
    weight_decay_at_y: NonNegative = 0.0
    """Decoupled weight decay at y."""
    warmup_steps: WarmupSteps = 0

    @property
    def takes_matrices(self) -> bool:
        return isinstance(self.base, MatrixBase)

    @property
    def beta(self) -> float:
        return self.momentum

    def overruled(self, overrides: Mapping[str, Any]) -> Self:
        base = overrides.get("base")
        if isinstance(base, Mapping):
            if base.get("algorithm", self.base.algorithm) == self.base.algorithm:
                overrides = {**overrides, "base": {**self.base.model_dump(), **base}}
            elif not self.takes_matrices:
                raise fault(("base", "algorithm"), "the base's algorithm belongs to the run, and cannot differ")
        return super().overruled(overrides)

    def fixed(self) -> dict[str, tuple[Any, str]]:
        why = "the base's algorithm belongs to the run, with the state that it keeps: create another run"
        return {**super().fixed(), "base": ((self.base.algorithm, self._state()), why)}

    def _state(self) -> dict[str, Any]:
        if self.takes_matrices or (isinstance(self.base, BaseAdamW) and not self.base.amsgrad):
            return {"base": ("exp_avg", "exp_avg_sq")}
        members = self.base.model_dump(include={"algorithm", "momentum", "centered", "amsgrad"})
        return {"base": {**members, "momentum": members.get("momentum", 0) > 0}}
