"""What an optimizer's state_dict says of its run: entries of the param groups, and the residual of each parameter.

`torch.distributed.checkpoint.state_dict`, and whoever else rebuilds a state_dict, keeps just these two: `param_groups`,
and a state for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from freestep.api.models import Point
from freestep.errors import ManifestMismatch
from freestep.names import plain_names
from freestep.wire.manifest import Manifest

__all__ = ["SavedPlace", "residual_by_parameter", "saved_residual"]


@dataclass(frozen=True)
class SavedPlace:
    """Where a worker was.

    run_id: what tells the run from others of its name, None where the service does not say. point: what the model
    contained, of which epoch and step.
    """

    run: str
    run_id: str | None
    worker: str
    point: Point
    epoch: int
    step: int

    def entries(self) -> dict[str, Any]:
        """The entries of a param group."""
        # Every step makes them: `asdict` would copy the values one by one.
        return dict(vars(self))

    @classmethod
    def of(cls, state_dict: Mapping[str, Any], run: str) -> SavedPlace:
        """The place in a state_dict. Raises ManifestMismatch if it has none, or is of another run."""
        if not isinstance(state_dict, Mapping):
            raise ManifestMismatch(f"a state is a dict, as state_dict() returns, and not {type(state_dict).__name__}")
        group: Mapping[str, Any] = next(iter(state_dict.get("param_groups", ())), {})
        names = [field.name for field in fields(cls)]
        if any(name not in group for name in names):
            raise ManifestMismatch("the state names no run: it is not of a RemoteOptimizer")
        place = cls(**{name: group[name] for name in names})
        if place.run != run:
            raise ManifestMismatch(f"the state is of the run {place.run!r}, not {run!r}")
        return place


def residual_by_parameter(residual: Tensor, names: Iterable[str], manifest: Manifest) -> Iterator[Tensor]:
    """A residual's views, one for each name, of the parameter's shape."""
    for name in names:
        slot = manifest.by_name[name]
        yield residual[slot.offset : slot.offset + slot.numel].view(slot.shape)


def saved_residual(state_dict: Mapping[str, Any], names: Iterable[str], manifest: Manifest) -> Tensor | None:
    """The residual of a state_dict, fp32 [manifest.numel].

    Its parameters are found by their names, or are in the order of `names` if it has others, or none. None if a
    parameter has no residual, as after another push_encoding. Raises ManifestMismatch if a shape is another.
    """
    names, groups = list(names), state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    saved = plain_names([name for group in groups for name in group.get("param_names", ())])
    if set(saved) == set(names):
        number_of = dict(zip(saved, numbers, strict=True))
        numbers = [number_of[name] for name in names]
    parts = [state_dict["state"].get(number, {}).get("residual") for number in numbers]
    if not parts or any(part is None for part in parts):
        return None
    residual = torch.zeros(manifest.numel, dtype=torch.float32, device="cpu")
    for name, view, part in zip(names, residual_by_parameter(residual, names, manifest), parts, strict=True):
        if part.shape != view.shape:
            raise ManifestMismatch(
                f"the residual of {name!r} has shape {list(part.shape)}, but the parameter has {list(view.shape)}"
            )
        view.copy_(part)
    return residual
