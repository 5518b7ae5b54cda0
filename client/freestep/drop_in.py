"""The optimizers of the `schedulefree` package with a run behind them: the same arguments, calls and `param_groups`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from freestep.answers import Pulled
from freestep.api.hyperparameters import ALGORITHMS, ScheduleFree
from freestep.averaging_weights import AveragingWeights
from freestep.groups import plain_value
from freestep.optimizer import RemoteOptimizer

__all__ = ["AdamCScheduleFreePlus", "AdamWScheduleFree", "DropIn", "RAdamScheduleFree", "SGDScheduleFree"]

logger = logging.getLogger("freestep")


class DropIn(RemoteOptimizer):
    """A RemoteOptimizer whose param groups also have `k`, `lr_max` and `weight_sum`, as the package's have.

    They are those of the point that the model contains. The last two are None where they do not follow from k and the
    hyperparameters: with ScheduleFree+, and where the run was created with an algorithm of another family.

    algorithm: the run's. arguments: the hyperparameters that the class's arguments give. Those that have the package's
    default are not asked for: a worker that names none takes the run's.
    """

    def __init__(self, params: Any, algorithm: str, arguments: Mapping[str, Any], **options: Any) -> None:
        arguments = {name: plain_value(value) for name, value in arguments.items()}
        fields = ALGORITHMS[algorithm].model_fields
        given = {name: value for name, value in arguments.items() if value != fields[name].default}
        super().__init__(params, algorithm=algorithm, **given, **options)

    @cached_property
    def _averaging_weights(self) -> list[AveragingWeights | None]:
        """Those of each param group."""
        names = self.spec.group_names()
        found = [self.spec.hyperparameters(names[number]) for number in self._run_groups]
        return [AveragingWeights(each) if isinstance(each, ScheduleFree) else None for each in found]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As RemoteOptimizer's; of a state that was saved at x, loads x, as the package's classes keep it.

        Args:
            state_dict: From `state_dict`.

        Raises:
            FreestepError: As for RemoteOptimizer.
        """
        super().load_state_dict(state_dict)
        if state_dict["param_groups"][0]["point"] == "x":
            self.eval()

    def _note_loaded(self, pulled: Pulled, *, came_with_push: bool = False) -> None:
        super()._note_loaded(pulled, came_with_push=came_with_push)
        for group, weights in zip(self.param_groups, self._averaging_weights, strict=True):
            group["k"] = pulled.step
            group["lr_max"], group["weight_sum"] = (None, None) if weights is None else weights.after(pulled.step)


def ignore_foreach(foreach: bool | None) -> None:
    """Logs that `foreach` has no effect, where it is given."""
    if foreach is not None:
        logger.debug("foreach=%s has no effect: the run's steps are taken by one compiled loop or kernel", foreach)


class SGDScheduleFree(DropIn):
    """`schedulefree.SGDScheduleFree` whose steps are taken by a run.

    Example:
        >>> optimizer = freestep.SGDScheduleFree(model.parameters(), lr=1.0, url="http://127.0.0.1:8000", run="mnist")

    Args:
        params: As for RemoteOptimizer; a module or its named parameters give the run's tensors their names.
        lr: The learning rate.
        momentum: β, the interpolation of x in y, above 0 and below 1.
        weight_decay: Weight decay at y: weight_decay · y is added to the gradient.
        warmup_steps: Steps of linear warmup.
        r: The power of k+1 in the weight of step k in the average.
        weight_lr_power: The power of the largest learning rate so far in that weight.
        foreach: Has no effect.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, or "local" for a run in this process; None takes FREESTEP_URL from the environment.
        **options: As for RemoteOptimizer, hyperparameters that the package does not have among them.

    Raises:
        FreestepError: As for RemoteOptimizer.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        ignore_foreach(foreach)
        super().__init__(
            params,
            "sgd_schedule_free",
            {
                "lr": float(lr),
                "momentum": momentum,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
            },
            run=run,
            url=url,
            **options,
        )


class AdamWScheduleFree(DropIn):
    """`schedulefree.AdamWScheduleFree` whose steps are taken by a run.

    Example:
        >>> optimizer = freestep.AdamWScheduleFree(model.parameters(), lr=0.0025, warmup_steps=100, url="local")
        >>> optimizer.train()
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(inputs), targets).backward()
        ...     optimizer.step()
        >>> optimizer.eval()

    Args:
        params: As for RemoteOptimizer; a module or its named parameters give the run's tensors their names.
        lr: The learning rate.
        betas: β, the interpolation of x in y; and the decay rate of the moving average of squared gradients.
        eps: Added to the denominator of the update, for numerical stability.
        weight_decay: Decoupled weight decay at y.
        warmup_steps: Steps of linear warmup.
        r: The power of k+1 in the weight of step k in the average.
        weight_lr_power: The power of the largest learning rate so far in that weight.
        foreach: Has no effect.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, or "local" for a run in this process; None takes FREESTEP_URL from the environment.
        **options: As for RemoteOptimizer, hyperparameters that the package does not have among them.

    Raises:
        FreestepError: As for RemoteOptimizer.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        ignore_foreach(foreach)
        super().__init__(
            params,
            "adamw_schedule_free",
            {
                "lr": float(lr),
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
            },
            run=run,
            url=url,
            **options,
        )


class RAdamScheduleFree(DropIn):
    """`schedulefree.RAdamScheduleFree` whose steps are taken by a run.

    Args:
        params: As for RemoteOptimizer; a module or its named parameters give the run's tensors their names.
        lr: The learning rate.
        betas: β, the interpolation of x in y; and the decay rate of the moving average of squared gradients.
        eps: Added to the denominator of the update, for numerical stability.
        weight_decay: Decoupled weight decay at y.
        r: The power of k+1 in the weight of step k in the average.
        weight_lr_power: The power of the largest learning rate so far in that weight.
        foreach: Has no effect.
        silent_sgd_phase: Whether the first steps, for which the rectification is not defined, change no weights; else
            they are SGD steps.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, or "local" for a run in this process; None takes FREESTEP_URL from the environment.
        **options: As for RemoteOptimizer, hyperparameters that the package does not have among them.

    Raises:
        FreestepError: As for RemoteOptimizer.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        silent_sgd_phase: bool = True,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        ignore_foreach(foreach)
        super().__init__(
            params,
            "radam_schedule_free",
            {
                "lr": float(lr),
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "silent_sgd_phase": silent_sgd_phase,
            },
            run=run,
            url=url,
            **options,
        )


class AdamCScheduleFreePlus(DropIn):
    """`AdamCScheduleFreePlusPaper` of the `schedulefree` repository (arXiv 2605.19095), with a run behind it.

    Every step needs the loss: `step_func(loss)`, `step(loss=loss)`, or a closure.

    Args:
        params: As for RemoteOptimizer; a module or its named parameters give the run's tensors their names.
        lr: The factor of the Polyak step size.
        betas: Decay rates of AdamC's moving averages of the gradient and of its square.
        sf_beta1: β, the interpolation of x in y, at the beginning.
        eps: Added to the denominator of the update, for numerical stability.
        weight_decay: Weight decay, times the square of the step size: suitable values are about 20, not 0.1.
        r: The power of k+1 in the weight of step k in the average.
        polyak_beta: Decay rate of the moving average of the gradients' norms in the Polyak step size.
        c_warmup: Steps at the beginning in which x is z.
        sf_beta1_anneal_steps: Steps in which β goes from sf_beta1 to sf_beta1_max; 0 keeps it at sf_beta1.
        sf_beta1_max: β after sf_beta1_anneal_steps.
        weight_lr_power: The power of the largest step size so far in the weight of a step.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, or "local" for a run in this process; None takes FREESTEP_URL from the environment.
        **options: As for RemoteOptimizer; `warmup_steps` among them, in place of a schedule of lr.

    Raises:
        FreestepError: As for RemoteOptimizer.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        sf_beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        polyak_beta: float = 0.0,
        c_warmup: int = 0,
        sf_beta1_anneal_steps: int = 0,
        sf_beta1_max: float = 0.965,
        weight_lr_power: float = 2.0,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            "adamc_schedule_free_plus",
            {
                "lr": float(lr),
                "betas": betas,
                "sf_beta1": sf_beta1,
                "eps": eps,
                "weight_decay": weight_decay,
                "r": r,
                "polyak_beta": polyak_beta,
                "c_warmup": c_warmup,
                "sf_beta1_anneal_steps": sf_beta1_anneal_steps,
                "sf_beta1_max": sf_beta1_max,
                "weight_lr_power": weight_lr_power,
            },
            run=run,
            url=url,
            **options,
        )

    def step_func(self, function_value: float | Tensor) -> float | Tensor:
        """Takes a step, as `step(loss=function_value)`.

        Args:
            function_value: The loss at the model's y.

        Returns:
            `function_value`.

        Raises:
            FreestepError: As for `step`.
        """
        self.step(loss=function_value)
        return function_value
