"""ScheduleFreeWrapper: Schedule-Free over one of torch's optimizers, whose class and hyperparameters the run has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freestep.answers import Pulled
from freestep.api import bases
from freestep.api.validation import StrictModel
from freestep.drop_in import DropIn
from freestep.errors import FreestepError

__all__ = ["ScheduleFreeWrapper"]

_BASES: dict[str, type[StrictModel]] = {
    "SGD": bases.BaseSGD,
    "RMSprop": bases.BaseRMSprop,
    "Adagrad": bases.BaseAdagrad,
    "Adam": bases.BaseAdam,
    "AdamW": bases.BaseAdamW,
    "NAdam": bases.BaseNAdam,
    "RAdam": bases.BaseRAdam,
    "Adamax": bases.BaseAdamax,
    "Rprop": bases.BaseRprop,
    "Muon": bases.BaseMuon,
}
"""Bases by the names of torch's classes, of which older versions lack some."""


class ScheduleFreeWrapper(DropIn):
    """`schedulefree.ScheduleFreeWrapper` whose steps are taken by a run, those of the base too.

    The base gives its parameters, its class and its param groups' hyperparameters when the wrapper is made; it is not
    called after that, and later changes to it have no effect.

    Example:
        >>> base = torch.optim.RMSprop(model.parameters(), lr=0.0025)
        >>> optimizer = freestep.ScheduleFreeWrapper(base, momentum=0.9, weight_decay_at_y=0.1, run="mnist")

    Args:
        base: An optimizer of `torch.optim` that has taken no step: SGD, RMSprop, Adagrad, Adam, AdamW, NAdam, RAdam,
            Adamax, Rprop, or Muon for matrices.
        weight_decay_at_y: Decoupled weight decay at y; the base's own is at z.
        momentum: β, the interpolation of x in y, above 0 and below 1.
        weight_lr_power: The power of the largest learning rate so far in the weight of a step in the average.
        r: The power of k+1 in the weight of step k in the average.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, or "local" for a run in this process; None takes FREESTEP_URL from the environment.
        **options: As for RemoteOptimizer; `warmup_steps` among them.

    Raises:
        FreestepError: The base is another, has taken steps, or maximizes; and as for RemoteOptimizer.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2.0,
        r: float = 0.0,
        *,
        run: str | None = None,
        url: str | None = None,
        **options: Any,
    ) -> None:
        _require_fresh(base)
        self.base = base
        self._base_rates = [float(group["lr"]) for group in base.param_groups]
        super().__init__(
            [{**_named(group), "base": _hyperparameters(base, group)} for group in base.param_groups],
            "schedule_free_wrapper",
            {
                "base": _hyperparameters(base, base.defaults),
                "weight_decay_at_y": weight_decay_at_y,
                "momentum": momentum,
                "weight_lr_power": weight_lr_power,
                "r": r,
            },
            run=run,
            url=url,
            **options,
        )

    def _note_loaded(self, pulled: Pulled, *, came_with_push: bool = False) -> None:
        super()._note_loaded(pulled, came_with_push=came_with_push)
        for own, group, given in zip(self.param_groups, self.base.param_groups, self._base_rates, strict=True):
            if group["lr"] != given:
                # Of a scheduler of the base's the next step warns as of one of the wrapper's.
                own["lr"] = group["lr"]


def _require_fresh(base: torch.optim.Optimizer) -> None:
    """Raises FreestepError for a base that a run cannot have, or whose state would be lost."""
    name = type(base).__name__
    if name not in _BASES or type(base) is not getattr(torch.optim, name, None):
        raise FreestepError(f"the base is {type(base)}, and a run can have one of torch.optim's {', '.join(_BASES)}")
    if any(group.get("maximize") for group in base.param_groups):
        raise FreestepError("the base has maximize=True, which a run does not: negate the loss")
    # Adagrad has a state from the start, of step 0.
    if any(state and not ("step" in state and float(state["step"]) == 0) for state in base.state.values()):
        raise FreestepError("the base has taken steps, whose state the run would not have: make a new one")


def _named(group: dict[str, Any]) -> dict[str, Any]:
    """The group's parameters, with their names if it has any."""
    names = group.get("param_names")
    return {"params": list(zip(names, group["params"], strict=True)) if names else group["params"]}


def _hyperparameters(base: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
    kind = _BASES[type(base).__name__]
    found = {name: given[name] for name in kind.model_fields if name in given}
    return {
        "algorithm": kind.model_fields["algorithm"].default,
        **{name: float(value) if isinstance(value, Tensor) else value for name, value in found.items()},
    }
