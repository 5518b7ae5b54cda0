"""Learning-rate schedules and averages of the baselines, as clients name them.

`k` counts steps from 0. All schedules begin with a linear warmup: lr · (k+1) / warmup_steps while k < warmup_steps;
what is said of them below counts steps from there. What remains of lr in the end is lr · end_factor.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from freestep.api.validation import Coefficient, Count, MetricName, NonNegative, Steps, StrictModel, fault, told_by

__all__ = [
    "Averaging",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Ema",
    "InverseSqrt",
    "Linear",
    "NoAveraging",
    "Plateau",
    "Polyak",
    "Schedule",
    "Step",
]

Factor = Annotated[float, Field(strict=True, ge=0, le=1)]


class _Warm(StrictModel):
    warmup_steps: Count = 0


class _Ending(_Warm):
    """What ends with step `total_steps`, warmup included, and stays there."""

    total_steps: Steps
    end_factor: Factor = 0.0

    @model_validator(mode="after")
    def _warm_before_the_end(self) -> Self:
        if self.total_steps <= self.warmup_steps:
            raise fault(("total_steps",), "must be more than warmup_steps")
        return self


class Constant(_Warm):
    name: Literal["constant"] = "constant"


class Linear(_Ending):
    """Down to the end on a straight line, as `torch.optim.lr_scheduler.LinearLR`."""

    name: Literal["linear"] = "linear"


class Cosine(_Ending):
    """Down to the end on half a cosine, as `torch.optim.lr_scheduler.CosineAnnealingLR`."""

    name: Literal["cosine"] = "cosine"


class CosineRestarts(_Warm):
    """Half a cosine over `cycle_steps`, then another, each `cycle_growth` times as long as the one before.

    SGDR, arXiv 1608.03983; as `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.
    """

    name: Literal["cosine_restarts"] = "cosine_restarts"
    cycle_steps: Steps
    cycle_growth: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    end_factor: Factor = 0.0


class Step(_Warm):
    """lr · gamma after every `step_size` steps, as `torch.optim.lr_scheduler.StepLR`."""

    name: Literal["step"] = "step"
    step_size: Steps
    gamma: Factor = 0.1


class InverseSqrt(_Warm):
    """lr · sqrt(w / (k+1)) from k + 1 = w on, with w = max(warmup_steps, 1) (arXiv 1706.03762, section 5.3)."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"


class Plateau(_Warm):
    """lr · factor when `metric`, which evaluators report, has not improved for more than `patience` reports.

    As `torch.optim.lr_scheduler.ReduceLROnPlateau`, of which a report is a step.
    """

    name: Literal["plateau"] = "plateau"
    metric: MetricName
    mode: Literal["min", "max"] = "min"
    factor: Coefficient = 0.1
    patience: Count = 10
    threshold: NonNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Count = 0
    min_lr: NonNegative = 0.0


_Schedules = Constant | Linear | Cosine | CosineRestarts | Step | InverseSqrt | Plateau
Schedule = Annotated[_Schedules, Field(discriminator="name"), told_by("name", _Schedules, default="constant")]


class _FromStep(StrictModel):
    start_step: Count = 0
    """Steps after which the average begins; until then x is y."""


class NoAveraging(StrictModel):
    """x is y."""

    name: Literal["none"] = "none"


class Polyak(_FromStep):
    """x is the mean of all y from the first step on, as `torch.optim.swa_utils.AveragedModel` has it."""

    name: Literal["polyak"] = "polyak"


class Ema(_FromStep):
    """x <- decay · x + (1 - decay) · y, from the y that the first step leaves, as `AveragedModel` has it."""

    name: Literal["ema"] = "ema"
    decay: Coefficient = 0.999


_Averages = NoAveraging | Polyak | Ema
Averaging = Annotated[_Averages, Field(discriminator="name"), told_by("name", _Averages, default="none")]
