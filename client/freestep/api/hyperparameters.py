"""The algorithms that a run may have, and their hyperparameters.

They keep the names and defaults of the `schedulefree` package and of `torch.optim`, and where a method is in neither,
its paper's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from freestep.api.bases import Base, BaseAdamW, BaseSGD, MatrixBase
from freestep.api.delay import DelayCorrection, NoCorrection
from freestep.api.schedules import Averaging, Constant, NoAveraging, Schedule
from freestep.api.validation import (
    Coefficient,
    Count,
    Epsilon,
    Flag,
    Interpolation,
    NonNegative,
    Positive,
    Power,
    Steps,
    StrictModel,
    fault,
    kinds_of,
    told_by,
)

__all__ = [
    "ALGORITHMS",
    "GPASGD",
    "LEAST_CORRECTED",
    "SGD",
    "AdamCScheduleFreePlus",
    "AdamW",
    "AdamWScheduleFree",
    "DiLoCo",
    "GPAAdamW",
    "OptimizerSpec",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "ScheduleFree",
    "ScheduleFreeWrapper",
]

LEAST_CORRECTED = 0.7
"""The least β of the user's with which delay is corrected for: what the correction makes of it is never less."""


class _Hyperparameters(StrictModel):
    needs_loss: ClassVar[bool] = False
    """Whether each push has to say its loss."""
    of_the_run: ClassVar[tuple[str, ...]] = ()
    """What no param group has of its own."""

    max_grad_norm: Positive | None = None
    """Each push's gradient is scaled to at most this 2-norm, taken over all parameters of the run."""

    def overruled(self, overrides: Mapping[str, Any]) -> Self:
        """A param group's hyperparameters: these, with its own in their place. Raises ValidationError."""
        for name in ("algorithm", "max_grad_norm", *self.of_the_run):
            if name in overrides:
                raise fault((name,), f"{name} belongs to the run, not to a group")
        made = type(self).model_validate({**self.model_dump(), **overrides})
        for name, kept in self._kept().items():
            if made._kept()[name] != kept:
                raise fault((name,), "all groups of a run keep the same state, and this one would keep another")
        return made

    def _kept(self) -> dict[str, Any]:
        """What decides, by its name, which vectors the method keeps."""
        return {}

    @property
    def takes_matrices(self) -> bool:
        """Whether a step takes a parameter whole, and as a matrix."""
        return False


class ScheduleFree(_Hyperparameters):
    """What the Schedule-Free algorithms have in common."""

    of_the_run = ("delay_correction",)

    r: Power = 0.0
    weight_lr_power: Power = 2.0
    averaging_constant: Annotated[float, Field(strict=True, gt=0, le=1e12)] | None = None
    """C of arXiv 2507.09846: the newest z weighs min(c · (1 - β) · C, 1) in the average, where it weighs c without."""
    delay_correction: DelayCorrection | None = None
    """None is `auto` where the run's policy admits stale gradients and β is large enough, else `none`."""

    @property
    @abstractmethod
    def beta(self) -> float:
        """β, how much of x there is in y."""

    @model_validator(mode="after")
    def _corrects_large_betas_only(self) -> Self:
        given = self.delay_correction
        if given is not None and not isinstance(given, NoCorrection) and self.beta < LEAST_CORRECTED:
            raise fault(("delay_correction",), f"corrects for delay where β is at least {LEAST_CORRECTED}")
        return self


class SGDScheduleFree(ScheduleFree):
    """Schedule-Free SGD, arXiv 2405.15682, as `schedulefree.SGDScheduleFree`."""

    algorithm: Literal["sgd_schedule_free"] = "sgd_schedule_free"
    lr: NonNegative = 1.0
    momentum: Interpolation = 0.9
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0

    @property
    def beta(self) -> float:
        return self.momentum


class AdamWScheduleFree(ScheduleFree):
    """Schedule-Free AdamW, arXiv 2405.15682, as `schedulefree.AdamWScheduleFree`.

    decay_at_z: weight decay takes z, as in `schedulefree.AdamWScheduleFreeReference`, and not y.
    inner_momentum: the coefficient of Adam's own average of gradients; 0 leaves it, and its vector, out.
    """

    algorithm: Literal["adamw_schedule_free"] = "adamw_schedule_free"
    lr: NonNegative = 0.0025
    betas: tuple[Interpolation, Coefficient] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0
    decay_at_z: Flag = False
    inner_momentum: Coefficient = 0.0

    @property
    def beta(self) -> float:
        return self.betas[0]

    def _kept(self) -> dict[str, Any]:
        return {"inner_momentum": self.inner_momentum > 0}


class RAdamScheduleFree(ScheduleFree):
    """Schedule-Free RAdam, as `schedulefree.RAdamScheduleFree`; the rectification is arXiv 1908.03265's."""

    algorithm: Literal["radam_schedule_free"] = "radam_schedule_free"
    lr: NonNegative = 0.0025
    betas: tuple[Interpolation, Interpolation] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    silent_sgd_phase: Flag = True

    @property
    def beta(self) -> float:
        return self.betas[0]


class ScheduleFreeWrapper(ScheduleFree):
    """Schedule-Free over an optimizer of torch's, as `schedulefree.ScheduleFreeWrapper`, or over NorMuon.

    The base has the learning rate, and its own weight decay takes z; `weight_decay_at_y` takes y. A group may overrule
    members of its base one by one; beside groups of matrices, others may have the base `adamw`.
    """

    algorithm: Literal["schedule_free_wrapper"] = "schedule_free_wrapper"
    base: Base
    momentum: Interpolation = 0.9
    weight_decay_at_y: NonNegative = 0.0
    warmup_steps: Count = 0

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
                raise fault(("base", "algorithm"), "the base's algorithm belongs to the run, not to a group")
        return super().overruled(overrides)

    def _kept(self) -> dict[str, Any]:
        if self.takes_matrices or (isinstance(self.base, BaseAdamW) and not self.base.amsgrad):
            return {"base": ("exp_avg", "exp_avg_sq")}
        members = self.base.model_dump(include={"algorithm", "momentum", "centered", "amsgrad"})
        return {"base": {**members, "momentum": members.get("momentum", 0) > 0}}


class AdamCScheduleFreePlus(_Hyperparameters):
    """ScheduleFree+ (arXiv 2605.19095), as `AdamCScheduleFreePlusPaper` of the `schedulefree` repository.

    The learning rate is `lr` times a Polyak step size, for which each push says its loss. betas: AdamC's. sf_beta1: how
    much of x there is in y, which goes to sf_beta1_max in sf_beta1_anneal_steps. weight_decay: times the square of the
    learning rate, so values are more like 20 than 0.1. polyak_beta: of the average of gradients' norms. c_warmup: steps
    in which x is z.
    """

    needs_loss: ClassVar[bool] = True
    of_the_run: ClassVar[tuple[str, ...]] = ("sf_beta1", "sf_beta1_anneal_steps", "sf_beta1_max", "polyak_beta")

    algorithm: Literal["adamc_schedule_free_plus"] = "adamc_schedule_free_plus"
    lr: NonNegative = 1.0
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.95)
    sf_beta1: Coefficient = 0.9
    sf_beta1_anneal_steps: Count = 0
    sf_beta1_max: Coefficient = 0.965
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0
    c_warmup: Count = 0
    polyak_beta: Coefficient = 0.0
    r: Power = 0.0
    weight_lr_power: Power = 2.0


class GPAAdamW(_Hyperparameters):
    """Generalized primal averaging over AdamW, arXiv 2512.17131: x is an exponential moving average of z.

    mu_x: what x keeps of itself in a step. mu_y: how much of x there is in y. The others are AdamW's.
    """

    algorithm: Literal["gpa_adamw"] = "gpa_adamw"
    mu_y: Interpolation = 0.7
    mu_x: Coefficient = 0.9967
    lr: NonNegative = 0.001
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01
    schedule: Schedule = Constant()


class GPASGD(_Hyperparameters):
    """Generalized primal averaging over SGD without momentum, arXiv 2512.17131; for pseudo-gradients, too.

    For mu_x = mu_y = μ it is SGD with Nesterov momentum μ and the learning rate lr · (1 - μ), and x a smoother y.
    The defaults are those of `diloco` in these terms; the paper has none for pseudo-gradients.
    """

    algorithm: Literal["gpa_sgd"] = "gpa_sgd"
    mu_y: Interpolation = 0.9
    mu_x: Coefficient = 0.9
    lr: NonNegative = 7.0
    weight_decay: NonNegative = 0.0
    schedule: Schedule = Constant()


class _Baseline(_Hyperparameters):
    schedule: Schedule = Constant()
    averaging: Averaging = NoAveraging()

    def _kept(self) -> dict[str, Any]:
        return {"averaging": self.averaging.name != "none"}


class SGD(BaseSGD, _Baseline):
    """Stochastic gradient descent, as `torch.optim.SGD`."""


class AdamW(_Baseline):
    """Adam with decoupled weight decay, arXiv 1711.05101, as `torch.optim.AdamW`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: NonNegative = 0.001
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: NonNegative = 0.01


class DiLoCo(_Hyperparameters):
    """The outer optimizer of DiLoCo, arXiv 2311.08105: SGD with Nesterov momentum, along pseudo-gradients.

    A pseudo-gradient is how far a worker's own steps have come, y at their beginning - where they ended.

    momentum_period: N of Delayed Nesterov, arXiv 2401.09135: the momentum changes once in N steps, by the mean of
    their gradients. momentum_activation: its c, the share of the momentum that each of the steps between takes; at most
    1/N.
    """

    algorithm: Literal["diloco"] = "diloco"
    lr: NonNegative = 0.7
    momentum: Coefficient = 0.9
    nesterov: Flag = True
    momentum_period: Steps = 1
    momentum_activation: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _delays_nesterov_momentum(self) -> Self:
        if self.momentum_period > 1 and not self.nesterov:
            raise fault(("momentum_period",), "it is Nesterov momentum that can be delayed")
        if self.momentum_activation * self.momentum_period > 1:
            raise fault(("momentum_activation",), "must be at most 1 / momentum_period")
        return self

    def _kept(self) -> dict[str, Any]:
        return {"momentum_period": self.momentum_period > 1}


_Algorithms = (
    SGDScheduleFree
    | AdamWScheduleFree
    | RAdamScheduleFree
    | ScheduleFreeWrapper
    | AdamCScheduleFreePlus
    | GPAAdamW
    | GPASGD
    | SGD
    | AdamW
    | DiLoCo
)
OptimizerSpec = Annotated[_Algorithms, Field(discriminator="algorithm"), told_by("algorithm", _Algorithms)]

ALGORITHMS: dict[str, type[_Algorithms]] = kinds_of("algorithm", _Algorithms)
"""Each algorithm's hyperparameters, by its name."""
