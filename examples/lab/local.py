"""A run without the web: the service's own state machine, driven in this process.

Where an experiment takes hundreds of runs, requests would take most of its time. The arithmetic of a run is that of
`freestep_service.shard.Shard`, which the service feeds with the entries of a log; this feeds it with the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from freestep.api.models import ParameterSpec, Point, RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.state.compute import HOST
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard

__all__ = ["LocalRun"]


class LocalRun:
    """A run that one process alone pushes to.

    optimizer: `algorithm` and its hyperparameters, as clients name them. initial: the weights, flat fp32 [numel].
    aggregation: the policy, as in a run's spec; it decides only whether pushes gather, who pushes says when.
    shapes: of the parameters that the weights are; None makes them one. groups: hyperparameters of each parameter's
    own, in its group; None where all have the run's.
    """

    def __init__(
        self,
        optimizer: Mapping[str, Any],
        initial: Tensor,
        aggregation: Mapping[str, Any] | None = None,
        *,
        shapes: Sequence[tuple[int, ...]] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        parameters = [
            {"name": f"w{number}", "shape": shape} for number, shape in enumerate(shapes or [(initial.numel(),)])
        ]
        named = {f"g{number}": dict(own) for number, own in enumerate(groups or ())}
        for parameter, group in zip(parameters, named, strict=False):
            parameter["group"] = group
        spec = RunSpec.model_validate(
            {
                "optimizer": dict(optimizer),
                "aggregation": dict(aggregation or {"policy": "async"}),
                "parameters": parameters,
                "groups": named,
            }
        )
        self._shard = Shard(spec, _manifest(spec.parameters), HOST)
        self._shard.initialize(initial, epoch=1)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self._shard.step

    def point(self, point: Point, out: Tensor | None = None) -> Tensor:
        """x, y or z as it is now, flat fp32 [numel]: in `out`, or in memory of its own."""
        if out is None:
            out = torch.empty(self._shard.manifest.numel)
        self._shard.copy_point(point, out)
        return out

    def push(self, gradient: Tensor, *, advance: bool = True, **others: Any) -> None:
        """Takes a gradient, flat fp32 [numel], and makes a step with it unless it is to wait for others.

        others: what else the log says of a push, as `Entry` has it: `damping`, `weight`, ...
        """
        self._shard.apply(Entry(self._shard.seq + 1, self._shard.epoch, advance, gradient, **others))


@cache
def _manifest(parameters: tuple[ParameterSpec, ...]) -> Manifest:
    return Manifest(parameters)
