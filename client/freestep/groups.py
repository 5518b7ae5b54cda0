"""Param groups of a torch optimizer as a run's spec."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import DEFAULT_GROUP, RunSpec
from freestep.errors import InvalidSpec, ManifestMismatch

__all__ = ["check_groups", "complete_hyperparameters", "named_tensors", "run_spec", "split_frozen"]

logger = logging.getLogger("freestep")

_GROUP_KEYS = ("params", "param_names", "name", "initial_lr")
"""What param groups have besides hyperparameters; torch's schedulers add the last."""
_OF_RUN = ("algorithm", "max_grad_norm")
"""What no group can have of its own."""

Model = TypeVar("Model", bound=BaseModel)


def complete_hyperparameters(algorithm: str, given: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of an algorithm: the given ones, and defaults for the others. Raises InvalidSpec."""
    if algorithm not in ALGORITHMS:
        raise InvalidSpec(
            f"unknown algorithm {algorithm!r}{_nearest(algorithm, ALGORITHMS)}: must be one of {', '.join(ALGORITHMS)}",
            field="optimizer.algorithm",
        )
    known = [name for name in ALGORITHMS[algorithm].model_fields if name != "algorithm"]
    for name in given:
        if name not in known:
            raise InvalidSpec(
                f"unknown hyperparameter {name!r} of {algorithm}{_nearest(name, known)}: it has {', '.join(known)}",
                field=name,
            )
    return _validated(ALGORITHMS[algorithm], given).model_dump(exclude={"algorithm"})


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
            if nearest := _nearest(key, given):
                raise InvalidSpec(f"param group {number}: unknown hyperparameter {key!r}{nearest}", field=key)
            logger.warning("param group %d: %r is no hyperparameter of the run, and has no effect", number, key)


def _nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'lr'?" where there is a name like it, else an empty string."""
    found = get_close_matches(name.lower(), list(known), 1)
    return f", did you mean {found[0]!r}?" if found else ""


def _validated(model: type[Model], value: Any) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidSpec(f"{field}: {first['msg']}", field=field) from None


def split_frozen(params: nn.Module | Iterable[Any]) -> tuple[list[Any], list[tuple[str, Tensor]]]:
    """The parameters or param groups without frozen parameters; and the frozen ones, with names for messages."""
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    items, frozen = list(params), list[tuple[str, Tensor]]()
    if items and isinstance(items[0], dict):
        return [{**group, "params": _trainable(group["params"], frozen)} for group in items], frozen
    return _trainable(items, frozen), frozen


def _trainable(params: Any, frozen: list[tuple[str, Tensor]]) -> list[Any]:
    kept = []
    for item in [params] if isinstance(params, Tensor) else params:
        name, tensor = item if isinstance(item, tuple) else ("", item)
        if tensor.requires_grad:
            kept.append(item)
        else:
            frozen.append((f"the parameter {name!r}" if name else f"a parameter of shape {list(tensor.shape)}", tensor))
    return kept


def named_tensors(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and group number of every parameter; parameters without names are numbered within their group."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or [f"group{number}.{index}" for index in range(len(group["params"]))]
        for name, tensor in zip(names, group["params"], strict=True):
            _require_real_and_strided(name, tensor)
            yield name, tensor, number


def _require_real_and_strided(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ManifestMismatch(
            f"the parameter {name!r} is {tensor.dtype}, and a run has real numbers only: train torch.view_as_real of it"
        )
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ManifestMismatch(f"the parameter {name!r} is {tensor.layout} {tensor.dtype}, and must be dense floats")


def run_spec(
    groups: Iterable[dict[str, Any]], algorithm: str, given: Mapping[str, Any], options: Mapping[str, Any]
) -> RunSpec:
    """The spec of a run for param groups.

    A group's hyperparameters that differ from the `given` ones become the group's own. options: the spec's other
    members, None for defaults. Raises InvalidSpec.
    """
    listed = list(groups)
    names = [
        group.get("name") or (DEFAULT_GROUP if len(listed) == 1 else f"group{number}")
        for number, group in enumerate(listed)
    ]
    own = {
        name: {key: group[key] for key in given if key != "max_grad_norm" and group[key] != given[key]}
        for name, group in zip(names, listed, strict=True)
    }
    return _validated(
        RunSpec,
        {
            "optimizer": {"algorithm": algorithm, **given},
            "parameters": [
                {"name": name, "shape": list(tensor.shape), "group": names[number]}
                for name, tensor, number in named_tensors(listed)
            ],
            "groups": {} if own == {DEFAULT_GROUP: {}} else own,
            **{name: value for name, value in options.items() if value is not None},
        },
    )
