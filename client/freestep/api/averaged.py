"""Algorithms with other averages than Schedule-Free's: ScheduleFree+, and generalized primal averaging."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from freestep.api.algorithm import Hyperparameters
from freestep.api.schedules import Constant, Schedule
from freestep.api.validation import (
    Coefficient,
    Count,
    Epsilon,
    Interpolation,
    LearningRate,
    NonNegative,
    Power,
    WarmupSteps,
)

__all__ = ["GPASGD", "AdamCScheduleFreePlus", "GPAAdamW"]

_MU_Y = "x is made of y and z with it, and would jump: create another run, from this one's state"


class AdamCScheduleFreePlus(Hyperparameters):
    """ScheduleFree+ (arXiv 2605.19095), as `AdamCScheduleFreePlusPaper` of the `schedulefree` repository.

    The step size is `lr` times a Polyak step size, for which every push must report its loss. Runs have one shard.
    """

    needs_loss: ClassVar[bool] = True
    of_the_run: ClassVar[tuple[str, ...]] = ("sf_beta1", "sf_beta1_anneal_steps", "sf_beta1_max", "polyak_beta")

    algorithm: Literal["adamc_schedule_free_plus"] = "adamc_schedule_free_plus"
    lr: NonNegative = 1.0
    """The factor of the Polyak step size."""
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.95)
    """Decay rates of AdamC's moving averages of the gradient and of its square."""
    sf_beta1: Coefficient = 0.9
    """β, the interpolation of x in y, at the beginning."""
    sf_beta1_anneal_steps: Count = 0
    """Steps in which β goes from sf_beta1 to sf_beta1_max; 0 keeps it at sf_beta1."""
    sf_beta1_max: Coefficient = 0.965
    """β after sf_beta1_anneal_steps."""
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    """Weight decay, times the square of the step size: suitable values are about 20, not 0.1."""
    warmup_steps: WarmupSteps = 0
    c_warmup: Count = 0
    """Steps at the beginning in which x is z."""
    polyak_beta: Coefficient = 0.0
    """Decay rate of the moving average of the gradients' norms in the Polyak step size; 0 takes the norm itself. Others
    act as in the author's code, whose average is corrected again and again: the first steps are far too small, about
    130 of them with 0.9, and 16,000 with 0.99."""
    r: Power = 0.0
    """The power of k+1 in the weight of step k in the average."""
    weight_lr_power: Power = 2.0
    """The power of the largest step size so far in the weight of a step in the average."""


class GPAAdamW(Hyperparameters):
    """Generalized primal averaging over AdamW (arXiv 2512.17131): x is an exponential moving average of z."""

    algorithm: Literal["gpa_adamw"] = "gpa_adamw"
    mu_y: Interpolation = 0.7
    """The interpolation of x in y."""
    mu_x: Coefficient = 0.9967
    """How much of x is kept in a step."""
    lr: LearningRate = 0.001
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    """Decay rates of the moving averages of the gradient and of its square."""
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, at z."""
    schedule: Schedule = Constant()
    """The learning-rate schedule, `constant` by default."""

    def fixed(self) -> dict[str, tuple[Any, str]]:
        return {"mu_y": (self.mu_y, _MU_Y)}


class GPASGD(Hyperparameters):
    """Generalized primal averaging over SGD without momentum (arXiv 2512.17131), also for pseudo-gradients.

    For mu_x = mu_y = μ, y is that of SGD with Nesterov momentum μ and learning rate lr · (1 - μ), and x a smoother y.
    The defaults are those of `diloco` in these terms; the paper has none for pseudo-gradients.
    """

    algorithm: Literal["gpa_sgd"] = "gpa_sgd"
    mu_y: Interpolation = 0.9
    """The interpolation of x in y."""
    mu_x: Coefficient = 0.9
    """How much of x is kept in a step."""
    lr: LearningRate = 7.0
    weight_decay: NonNegative = 0.0
    """Weight decay, at z."""
    schedule: Schedule = Constant()
    """The learning-rate schedule, `constant` by default."""

    def fixed(self) -> dict[str, tuple[Any, str]]:
        return {"mu_y": (self.mu_y, _MU_Y)}
