"""Optimizers that run in the process, of `schedulefree` and of `torch.optim`, in the terms of a run.

Their classes are told by module and name, so that no package is imported for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freestep.api.models import RunSpec
from freestep.errors import ManifestMismatch
from freestep.groups import complete_hyperparameters, local_parameters
from freestep.run_request import RunRequest

__all__ = ["LocalOptimizer", "Member"]

_AVERAGE = ("r", "weight_lr_power")
_SGD = ("lr", "momentum", "weight_decay", "warmup_steps", *_AVERAGE)
_ADAMW = ("lr", "betas", "eps", "weight_decay", "warmup_steps", *_AVERAGE)
_RADAM = ("lr", "betas", "eps", "weight_decay", "silent_sgd_phase", *_AVERAGE)
_WRAPPER = ("momentum", "weight_decay_at_y", *_AVERAGE)


@dataclass(frozen=True)
class Form:
    """A class of optimizers.

    names: its hyperparameters, in the param groups. vectors: what it keeps of each parameter beside its points, by the
    run's names, which are its own. averages: whether it keeps z, and its param groups the scalars of the average.
    keeps_points: whether it keeps x and y beside z. rests_at_x: whether parameters are at x between its steps.
    is_l2: whether its weight decay is an L2 penalty where its param groups do not say that it is decoupled.
    """

    algorithm: str
    names: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    averages: bool = True
    keeps_points: bool = False
    rests_at_x: bool = False
    is_l2: bool = False


_FORMS: dict[tuple[str, str], Form] = {
    ("schedulefree", "SGDScheduleFree"): Form("sgd_schedule_free", _SGD),
    ("schedulefree", "SGDScheduleFreeClosure"): Form("sgd_schedule_free", _SGD, rests_at_x=True),
    ("schedulefree", "SGDScheduleFreeReference"): Form("sgd_schedule_free", _SGD, keeps_points=True),
    ("schedulefree", "AdamWScheduleFree"): Form("adamw_schedule_free", _ADAMW, ("exp_avg_sq",)),
    ("schedulefree", "AdamWScheduleFreeClosure"): Form("adamw_schedule_free", _ADAMW, ("exp_avg_sq",), rests_at_x=True),
    ("schedulefree", "AdamWScheduleFreeReference"): Form(
        "adamw_schedule_free", (*_ADAMW, "decay_at_z"), ("exp_avg_sq",), keeps_points=True
    ),
    ("schedulefree", "RAdamScheduleFree"): Form("radam_schedule_free", _RADAM, ("exp_avg_sq",)),
    ("schedulefree", "RAdamScheduleFreeClosure"): Form("radam_schedule_free", _RADAM, ("exp_avg_sq",), rests_at_x=True),
    ("schedulefree", "ScheduleFreeWrapper"): Form("schedule_free_wrapper", _WRAPPER),
    ("schedulefree", "ScheduleFreeWrapperReference"): Form("schedule_free_wrapper", _WRAPPER, keeps_points=True),
    ("torch", "SGD"): Form(
        "sgd", ("lr", "momentum", "dampening", "weight_decay", "nesterov"), ("momentum_buffer",), averages=False
    ),
    ("torch", "AdamW"): Form(
        "adamw", ("lr", "betas", "eps", "weight_decay"), ("exp_avg", "exp_avg_sq"), averages=False
    ),
    ("torch", "Adam"): Form(
        "adamw", ("lr", "betas", "eps", "weight_decay"), ("exp_avg", "exp_avg_sq"), averages=False, is_l2=True
    ),
}
_BASES: dict[tuple[str, str], Form] = {
    ("torch", "SGD"): _FORMS["torch", "SGD"],
    ("torch", "Adagrad"): Form(
        "adagrad", ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"), ("sum",), averages=False
    ),
}
"""The bases that the package's wrapper can take a step over."""


@dataclass(frozen=True)
class Member:
    """A parameter of an optimizer: its name in the run, the tensor, and its param group."""

    name: str
    tensor: Tensor
    group: dict[str, Any]


class LocalOptimizer:
    """An optimizer of a known class.

    Attributes: `members`, its parameters that are not frozen, in order; `spec`, that of a run that takes its steps;
    `form`, its class; `base`, that of the optimizer which it wraps, or None.

    Args:
        optimizer: The optimizer.
        model: Names its parameters; None takes the names in its param groups, or numbers.

    Raises:
        ManifestMismatch: Its class or a hyperparameter has no counterpart in a run, or a parameter is none of the
            model's.
        InvalidSpec: A hyperparameter is out of the range that runs accept.
    """

    def __init__(self, optimizer: Any, model: nn.Module | None) -> None:
        self.optimizer = optimizer
        self.form = _form_of(optimizer, _FORMS)
        self.is_wrapper = self.form.algorithm == "schedule_free_wrapper"
        self.base = _form_of(optimizer.base, _BASES) if self.is_wrapper else None
        groups = [self._named(group, model) for group in optimizer.param_groups]
        hyperparameters = [
            complete_hyperparameters(self.form.algorithm, self._hyperparameters(group))
            for group in optimizer.param_groups
        ]
        described = [{**group, **each} for group, each in zip(groups, hyperparameters, strict=True)]
        parameters = local_parameters(groups)
        self.spec: RunSpec = RunRequest(self.form.algorithm, hyperparameters[0], {}).spec(described, parameters)
        self.members = [Member(each.name, each.tensor, optimizer.param_groups[each.group]) for each in parameters]

    def _named(self, group: dict[str, Any], model: nn.Module | None) -> dict[str, Any]:
        """A param group's parameters that are not frozen, with their names, and the group's own name."""
        names: list[str] | None = group.get("param_names")
        if model is not None:
            known = {parameter: name for name, parameter in model.named_parameters()}
            if any(parameter not in known for parameter in group["params"]):
                raise ManifestMismatch("the optimizer has a parameter that is none of the model's")
            names = [known[parameter] for parameter in group["params"]]
        kept = [number for number, parameter in enumerate(group["params"]) if parameter.requires_grad]
        named = {} if names is None else {"param_names": [names[number] for number in kept]}
        own = {"name": group["name"]} if "name" in group else {}
        return {"params": [group["params"][number] for number in kept], **named, **own}

    def _hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A param group's hyperparameters as the run's algorithm names them."""
        _require_plain(self.form, group)
        if self.base is None:
            return {name: _plain(group[name]) for name in self.form.names}
        if float(group.get("d", 1.0)) != 1:
            raise ManifestMismatch("the base adapts its learning rate by d, which runs do not")
        base = {"algorithm": self.base.algorithm, **{name: _plain(group[name]) for name in self.base.names}}
        # The wrapper's own; the reference form has its weight decay in the groups.
        own = {name: getattr(self.optimizer, name, group.get(name)) for name in self.form.names}
        return {"base": base, **own}

    @property
    def vectors(self) -> tuple[str, ...]:
        """The state vectors of a run of its kind, beside the points."""
        if self.base is not None:
            return tuple(name for name in self.base.vectors if name != "momentum_buffer" or self._has_momentum())
        return self.form.vectors

    def _has_momentum(self) -> bool:
        return any(group["momentum"] > 0 for group in self.optimizer.param_groups)

    def state_of(self, tensor: Tensor) -> dict[str, Any]:
        """What it keeps of a parameter; nothing before the parameter's first step."""
        return dict(self.optimizer.state[tensor]) if tensor in self.optimizer.state else {}

    def is_at_y(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's parameters are at y, and not at x."""
        if self.form.rests_at_x:
            return False
        return bool(self.optimizer.train_mode if self.is_wrapper else group["train_mode"])

    def beta(self, group: Mapping[str, Any]) -> float:
        """The interpolation of x in y."""
        if self.is_wrapper:
            return float(self.optimizer.momentum)
        return float(group["momentum"] if "momentum" in self.form.names else group["betas"][0])

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Member]]]:
        """Each param group that has parameters, with these."""
        for group in self.optimizer.param_groups:
            members = [member for member in self.members if member.group is group]
            if members:
                yield group, members


def _form_of(optimizer: Any, forms: Mapping[tuple[str, str], Form]) -> Form:
    # Libraries wrap optimizers in subclasses of their own, which keep state as the class does.
    for kind in type(optimizer).__mro__:
        form = forms.get((kind.__module__.partition(".")[0], kind.__name__))
        if form is not None:
            return form
    known = ", ".join(f"{package}'s {name}" for package, name in forms)
    raise ManifestMismatch(f"a run has no place for the state of {type(optimizer).__name__}: it must be one of {known}")


def _require_plain(form: Form, group: Mapping[str, Any]) -> None:
    """Raises ManifestMismatch for options of torch's that change the steps, and that runs do not have."""
    if group.get("maximize"):
        raise ManifestMismatch("maximize=True has no counterpart in a run: negate the loss")
    if group.get("amsgrad"):
        raise ManifestMismatch("amsgrad=True has no counterpart in the algorithm adamw")
    if form.is_l2 and not group.get("decoupled_weight_decay", False) and group["weight_decay"] != 0:
        raise ManifestMismatch("Adam's weight_decay is an L2 penalty, and that of the algorithm adamw is decoupled")


def _plain(value: Any) -> Any:
    """A hyperparameter as a number, where torch has it as a tensor."""
    if isinstance(value, torch.Tensor):
        return float(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value
