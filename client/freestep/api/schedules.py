"""Learning-rate schedules and averages of the baselines.

Steps k are counted from 0. Every schedule begins with a linear warmup, lr · (k+1) / warmup_steps while k <
warmup_steps, and counts its own steps from the warmup's end.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from freestep.api.validation import (
    Coefficient,
    Count,
    MetricName,
    NonNegative,
    Steps,
    StrictModel,
    WarmupSteps,
    fault,
    told_by,
)

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
    warmup_steps: WarmupSteps = 0


class _Ending(_Warm):
    """A schedule that ends at step `total_steps`; the learning rate then stays as it is."""

    total_steps: Steps
    """The step at which the schedule ends, warmup included; more than warmup_steps."""
    end_factor: Factor = 0.0
    """The learning rate at the end, as a fraction of lr."""

    @model_validator(mode="after")
    def _ends_after_warmup(self) -> Self:
        if self.total_steps <= self.warmup_steps:
            raise fault(("total_steps",), "must be more than warmup_steps")
        return self


class Constant(_Warm):
    """The same learning rate after the warmup."""

    name: Literal["constant"] = "constant"


class Linear(_Ending):
    """Linear decay to the end, as `torch.optim.lr_scheduler.LinearLR`."""

    name: Literal["linear"] = "linear"


class Cosine(_Ending):
    """Half a cosine to the end, as `torch.optim.lr_scheduler.CosineAnnealingLR`."""

    name: Literal["cosine"] = "cosine"


class CosineRestarts(_Warm):
    """Half a cosine again and again (SGDR, arXiv 1608.03983), as torch's `CosineAnnealingWarmRestarts`."""

    name: Literal["cosine_restarts"] = "cosine_restarts"
    cycle_steps: Steps
    """Steps of the first cycle."""
    cycle_growth: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    """How many times as long as the one before each cycle is."""
    end_factor: Factor = 0.0
    """The learning rate at the end of a cycle, as a fraction of lr."""


class Step(_Warm):
    """A decay by `gamma` every `step_size` steps, as `torch.optim.lr_scheduler.StepLR`."""

    name: Literal["step"] = "step"
    step_size: Steps
    """Steps between two decays."""
    gamma: Factor = 0.1
    """The factor of each decay."""


class InverseSqrt(_Warm):
    """lr · sqrt(w / (k+1)) from step w on, with w = max(warmup_steps, 1): arXiv 1706.03762, section 5.3."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"


class Plateau(_Warm):
    """A decay when a reported metric has stopped improving, as `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Every report of the metric (`Run.report`) is what a step of torch's scheduler is.
    """

    name: Literal["plateau"] = "plateau"
    metric: MetricName
    """The metric's name."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller value is better ("min") or a larger one ("max")."""
    factor: Coefficient = 0.1
    """The factor of each decay."""
    patience: Count = 10
    """How many reports without an improvement do not yet cause a decay."""
    threshold: NonNegative = 1e-4
    """By how much a value must be better than the best one to count as an improvement."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether `threshold` is a fraction of the best value ("rel") or a difference to it ("abs")."""
    cooldown: Count = 0
    """Reports after a decay during which none counts as without an improvement."""
    min_lr: NonNegative = 0.0
    """The least learning rate to decay to."""


_Schedules = Constant | Linear | Cosine | CosineRestarts | Step | InverseSqrt | Plateau
Schedule = Annotated[_Schedules, Field(discriminator="name"), told_by("name", _Schedules, default="constant")]


class _FromStep(StrictModel):
    start_step: Count = 0
    """Steps before averaging begins; until then x is y."""


class NoAveraging(StrictModel):
    """No average: x is y."""

    name: Literal["none"] = "none"


class Polyak(_FromStep):
    """The mean of all y since `start_step`, as `torch.optim.swa_utils.AveragedModel`."""

    name: Literal["polyak"] = "polyak"


class Ema(_FromStep):
    """An exponential moving average, x <- decay · x + (1 - decay) · y, as `torch.optim.swa_utils.AveragedModel`."""

    name: Literal["ema"] = "ema"
    decay: Coefficient = 0.999
    """How much of x is kept in a step."""


_Averages = NoAveraging | Polyak | Ema
Averaging = Annotated[_Averages, Field(discriminator="name"), told_by("name", _Averages, default="none")]
