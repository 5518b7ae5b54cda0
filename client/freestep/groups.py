"""Param groups of a torch optimizer as a run's spec."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import DEFAULT_GROUP, RunSpec
from freestep.errors import InvalidSpec

__all__ = ["complete_hyperparameters", "named_tensors", "run_spec", "split_frozen"]

Model = TypeVar("Model", bound=BaseModel)


def complete_hyperparameters(algorithm: str, given: dict[str, Any]) -> dict[str, Any]:
    """All hyperparameters of an algorithm: the given ones, and defaults for the others. Raises InvalidSpec."""
    if algorithm not in ALGORITHMS:
        raise InvalidSpec(
            f"unknown algorithm {algorithm!r}: must be one of {', '.join(ALGORITHMS)}", field="optimizer.algorithm"
        )
    return _validated(ALGORITHMS[algorithm], given).model_dump(exclude={"algorithm"})


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
            yield name, tensor, number


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
