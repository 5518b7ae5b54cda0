"""Param groups of a torch optimizer: their parameters, and their hyperparameters as a run has them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import RunSpec
from freestep.api.validation import first_fault
from freestep.errors import InvalidSpec, ManifestMismatch
from freestep.names import fitted_names, numbered_names, plain_names

__all__ = [
    "LocalParameter",
    "check_groups",
    "complete_hyperparameters",
    "fitted",
    "hyperparameter_names",
    "hyperparameter_values",
    "local_parameters",
    "nearest",
    "plain_value",
    "require_finite",
    "show_hyperparameters",
    "split_frozen",
    "validated",
]

logger = logging.getLogger("freestep")

_GROUP_KEYS = ("params", "param_names", "name", "initial_lr")
"""What param groups have besides hyperparameters; torch's schedulers add the last."""
_OF_RUN = ("algorithm", "max_grad_norm")
"""What no group can have of its own."""

_WANTED = "params must be an nn.Module, its parameters or named_parameters(), or param groups of these"

Model = TypeVar("Model", bound=BaseModel)


class LocalParameter(NamedTuple):
    """A parameter of the model: its name, its tensor, and the number of its param group."""

    name: str
    tensor: Tensor
    group: int


def hyperparameter_names(algorithm: str) -> list[str]:
    """The names of an algorithm's hyperparameters. Raises InvalidSpec if there is no such algorithm."""
    if algorithm not in ALGORITHMS:
        raise InvalidSpec(
            f"unknown algorithm {algorithm!r}{nearest(algorithm, ALGORITHMS)}: must be one of {', '.join(ALGORITHMS)}",
            field="optimizer.algorithm",
        )
    return [name for name in ALGORITHMS[algorithm].model_fields if name != "algorithm"]


def complete_hyperparameters(algorithm: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of an algorithm: the given ones, and defaults for the others. Raises InvalidSpec."""
    known = hyperparameter_names(algorithm)
    for name in given:
        if name not in known:
            raise InvalidSpec(
                f"unknown hyperparameter {name!r} of {algorithm}{nearest(name, known)}: it has {', '.join(known)}",
                field=name,
            )
    plain = {name: plain_value(value) for name, value in given.items()}
    return hyperparameter_values(validated(ALGORITHMS[algorithm], plain))


def plain_value(value: Any) -> Any:
    """A hyperparameter as Python's own number, where it is a tensor's, numpy's, or a whole float."""
    if isinstance(value, tuple | list):
        return tuple(map(plain_value, value))
    return value.tolist() if hasattr(value, "tolist") else value


def hyperparameter_values(hyperparameters: BaseModel) -> dict[str, Any]:
    """Hyperparameters by name, without the algorithm."""
    return hyperparameters.model_dump(exclude={"algorithm"})


def check_groups(params: Iterable[Any], given: Mapping[str, Any]) -> None:
    """Refuses what a param group gives that would have no effect, or warns where it may be another library's.

    params: before the optimizer has completed the groups. given: the run's hyperparameters. Raises InvalidSpec.
    """
    for number, group in enumerate(params):
        if not isinstance(group, dict):
            return
        for key in group:
            if key in _GROUP_KEYS or (key in given and key not in _OF_RUN):
                continue
            if key in _OF_RUN:
                raise InvalidSpec(
                    f"param group {number}: {key!r} is of the whole run: give it to the optimizer", field=key
                )
            if hint := nearest(key, given):
                raise InvalidSpec(f"param group {number}: unknown hyperparameter {key!r}{hint}", field=key)
            logger.warning("param group %d: %r is no hyperparameter of the run, and has no effect", number, key)


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'lr'?" where there is a name like it, else an empty string."""
    found = get_close_matches(name.lower(), list(known), 1)
    return f", did you mean {found[0]!r}?" if found else ""


def validated(model: type[Model], value: Any) -> Model:
    """A value as a model. Raises InvalidSpec, which names the field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        place, why = first_fault(error)
        field = ".".join(map(str, place))
        raise InvalidSpec(f"{field}: {why}", field=field) from None


def split_frozen(params: nn.Module | Iterable[Any]) -> tuple[list[Any], list[tuple[str, Tensor]]]:
    """The parameters or param groups without frozen parameters; and the frozen ones, with names for messages.

    Raises TypeError for what are no parameters.
    """
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, Tensor):
        raise TypeError(f"{_WANTED}, not a single tensor: put it into a list")
    items, frozen = list(params), list[tuple[str, Tensor]]()
    if items and isinstance(items[0], dict):
        return [_trainable_group(group, frozen) for group in items], frozen
    return _trainable(items, frozen), frozen


def _trainable_group(group: dict[str, Any], frozen: list[tuple[str, Tensor]]) -> dict[str, Any]:
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    kept = _trainable(params, frozen)
    if not kept and any(isinstance(item, tuple) for item in params):
        # Else torch takes it for a group without names, which cannot stand beside one with names.
        return {**group, "params": kept, "param_names": []}
    return {**group, "params": kept}


def _trainable(params: Iterable[Any], frozen: list[tuple[str, Tensor]]) -> list[Any]:
    kept = []
    for item in params:
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else ("", item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_WANTED}, and {tensor!r} is of {type(tensor).__name__}")
        if tensor.requires_grad:
            kept.append(item)
        else:
            frozen.append((f"the parameter {name!r}" if name else f"a parameter of shape {list(tensor.shape)}", tensor))
    return kept


def local_parameters(groups: Iterable[dict[str, Any]]) -> list[LocalParameter]:
    """Every parameter of param groups, with plain names; parameters without names are numbered within their group.

    Raises ManifestMismatch, naming the parameter, for one that a run cannot hold, or that cannot be trained.
    """
    made = []
    for number, group in enumerate(groups):
        names = group.get("param_names") or numbered_names(number, len(group["params"]))
        for name, tensor in zip(names, group["params"], strict=True):
            _require_dense_and_real(name, tensor)
            _require_writable(name, tensor)
            made.append(LocalParameter(name, tensor, number))
    plain = plain_names([each.name for each in made])
    if repeated := next((name for name, count in Counter(plain).items() if count > 1), None):
        raise ManifestMismatch(f"two parameters are named {repeated!r}")
    _require_apart(made)
    return [each._replace(name=name) for each, name in zip(made, plain, strict=True)]


def require_finite(parameters: Iterable[LocalParameter]) -> None:
    """Raises ManifestMismatch, naming the parameter, where a run could not begin with its values."""
    for name, tensor, _ in parameters:
        if not bool(tensor.detach().float().isfinite().all()):
            raise ManifestMismatch(
                f"the parameter {name!r} has NaN or infinity as fp32, and a run does not begin with that: "
                "initialize, or load, the model first"
            )


def _require_dense_and_real(name: str, tensor: Tensor) -> None:
    # By names, since torch's own modules take half a second to import: of FSDP2's class, and of what FSDP1 marks.
    is_dtensor = any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)
    if is_dtensor or getattr(tensor, "_fsdp_flattened", False):
        raise ManifestMismatch(
            f"the parameter {name!r} is divided between ranks, as FSDP does, and a run needs whole parameters: use "
            "DistributedDataParallel with process_group=True"
        )
    if tensor.is_meta:
        raise ManifestMismatch(f"the parameter {name!r} is on the meta device, and has no values: load the model first")
    if tensor.is_complex():
        raise ManifestMismatch(
            f"the parameter {name!r} is {tensor.dtype}, and a run has real numbers only: train torch.view_as_real of it"
        )
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ManifestMismatch(f"the parameter {name!r} is {tensor.layout} {tensor.dtype}, and must be dense floats")


def _require_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise ManifestMismatch(
            f"the parameter {name!r} was made in inference mode, and cannot be changed: make the model outside of it"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ManifestMismatch(
            f"the parameter {name!r} is expanded: its elements share memory, and cannot be changed each for itself: "
            "give the tensor that it was expanded from, or a clone"
        )


def _require_apart(parameters: Iterable[LocalParameter]) -> None:
    """Of contiguous tensors: others may be between each other's elements."""
    found = sorted(
        (
            (str(tensor.device), tensor.data_ptr(), name, tensor)
            for name, tensor, _ in parameters
            if type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type in ("cpu", "cuda")
            and tensor.is_contiguous()
            and tensor.numel()
        ),
        key=lambda each: each[:2],
    )
    for (device, begin, name, tensor), (next_device, next_begin, next_name, other) in pairwise(found):
        if tensor is not other and device == next_device and next_begin < begin + tensor.nbytes:
            raise ManifestMismatch(
                f"the parameters {name!r} and {next_name!r} share memory, and a run would train each for itself: make "
                "them one parameter of the model"
            )


def fitted(parameters: Sequence[LocalParameter], spec: RunSpec, run: str) -> list[LocalParameter]:
    """The parameters by the names that a run has for them. Raises ManifestMismatch if they are not the run's."""
    shapes = {each.name: tuple(each.tensor.shape) for each in parameters}
    names = fitted_names(shapes, {each.name: each.shape for each in spec.parameters}, run)
    return [each._replace(name=names[each.name]) for each in parameters]


def show_hyperparameters(
    groups: Sequence[dict[str, Any]], parameters: Sequence[LocalParameter], given: Iterable[str], run: RunSpec
) -> list[int]:
    """Puts the run's hyperparameters into param groups, in the place of the given ones.

    A group whose parameters are in several of the run's groups shows the values of the whole run.

    parameters: by the run's names. Returns, for each group, the place of its first parameter's group in
    `RunSpec.group_names`.
    """
    order = run.group_names()
    group_of = {parameter.name: parameter.group for parameter in run.parameters}
    places = []
    for number, group in enumerate(groups):
        for name in given:
            group.pop(name, None)
        here = list(dict.fromkeys(group_of[each.name] for each in parameters if each.group == number))
        group.update(hyperparameter_values(run.hyperparameters(here[0]) if len(here) == 1 else run.optimizer))
        if "base" in group:
            # Where schedulers and loggers look for it.
            group["lr"] = group["base"]["lr"]
        places.append(order.index(here[0]) if here else 0)
    return places
