"""A shard: its stretch of a run's state vectors and what happens to them, one log entry after another.

The law of this file: no IO, no clock, no lock. It is a function of the entries applied to it, in the order of the
log, and of nothing else; whoever calls it sees to it that one thread does so at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freestep.manifest import Manifest
from freestep.models import Point, RunSpec
from freestep_service.aggregation import Policy
from freestep_service.optimizers import (
    METHODS,
    Quanta,
    Scalars,
    gather,
    initial_buffers,
    interpolate,
    quantize,
    segments,
    step,
)
from freestep_service.optimizers.readiness import compile_kernels
from freestep_service.optimizers.streams import settle

__all__ = ["DTYPES", "Cut", "Entry", "Shard"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's names of the dtypes that travel as they are."""


@dataclass(frozen=True)
class Entry:
    """One entry of the commit log, with the gradient that was staged for it.

    seq: its place in the log. epoch: the run's when it was committed.
    advance: whether the pushes gathered so far, this one included, become an update.
    gradient: flat fp32 [numel], on the host or where the shard is; None where the entry is no push: the end of a lease
        closed the update, or the entry only marks a place.
    weight: the push's share in the mean, in samples. scale: what clipping leaves of the gradient, in (0, 1].
    damping: what staleness leaves of the learning rate, in (0, 1].
    """

    seq: int
    epoch: int
    advance: bool
    gradient: Tensor | None = None
    worker: str = ""
    weight: float = 1.0
    scale: float = 1.0
    damping: float = 1.0
    cuts: Mapping[str, str] = field(default_factory=dict)
    """Ticket -> "POINT DTYPE", and the shard where only one is asked: points wanted of the state that this leaves."""
    checkpoint: bool = False
    """Whether that state is to be kept."""


@dataclass(frozen=True)
class Cut:
    """A shard's whole state between two entries of the log, in memory of its own."""

    epoch: int
    step: int
    seq: int
    tensors: dict[str, Tensor]
    """The state vectors by name, and `accumulated` where pushes have been gathered; on the CPU."""
    scalars: dict[str, Scalars]
    group: dict[str, int]
    weight: float
    damping: float


class Shard:
    """The state of a stretch of one run's parameters, as of log entry `seq` and step `step` of epoch `epoch`."""

    def __init__(self, spec: RunSpec, manifest: Manifest, device: torch.device) -> None:
        self.manifest = manifest
        self.device = device
        self.epoch = self.step = self.seq = 0
        self._method = METHODS[spec.optimizer.algorithm]
        self._layout = segments(self.manifest.slots)
        # All of the run's groups, so that the scalars of any one shard are those of every other.
        groups = {parameter.group for parameter in spec.parameters}
        self._hyperparameters: dict[str, Any] = {group: spec.hyperparameters(group) for group in sorted(groups)}
        self._gathers = Policy.of(spec.aggregation).groups
        self._buffers: dict[str, Tensor] = {}
        self._scalars: dict[str, Scalars] = {}
        self._accumulated: Tensor | None = None
        self._clear_group()

    def _clear_group(self) -> None:
        self.group: dict[str, int] = {}
        self._weight = 0.0
        self._damping = 0.0

    def prepare(self) -> None:
        """Has compiled what a GPU will be asked for, which may take seconds; changes nothing of the state."""
        compile_kernels(self._method, self._layout, self._hyperparameters, self.device, gathers=self._gathers)

    def initialize(self, parameters: Tensor, epoch: int) -> None:
        """Starts at step 0 from the initial weights, flat fp32 [numel], which are copied."""
        self.epoch, self.step, self.seq = epoch, 0, 0
        self._buffers = initial_buffers(self._method, parameters.to(self.device, copy=True))
        self._scalars = dict.fromkeys(self._hyperparameters, self._method.initial)
        self._clear_group()
        settle(self.device)

    def apply(self, entry: Entry) -> None:
        """Applies the log's next entry.

        A group's gradient is the mean of its pushes weighted by their samples, and its damping likewise.
        """
        assert (entry.epoch, entry.seq) == (self.epoch, self.seq + 1), "entries come in the order of the log"
        self.seq = entry.seq
        if entry.gradient is None and not entry.advance:
            return
        gradient = None if entry.gradient is None else entry.gradient.to(self.device)
        scale = entry.scale
        damping = entry.damping
        if self._gathers:
            if gradient is not None:
                self._gather(gradient, entry)
            if not entry.advance:
                return
            gradient = self._accumulated
            scale = 1 / self._weight
            damping = self._damping / self._weight
        assert gradient is not None
        self._scalars = step(
            self._method,
            self._layout,
            self._hyperparameters,
            self._scalars,
            self._buffers,
            gradient,
            scale=scale,
            damping=damping,
        )
        self.step += 1
        self._clear_group()

    def _gather(self, gradient: Tensor, entry: Entry) -> None:
        if self._accumulated is None:
            self._accumulated = torch.empty_like(gradient)
        gather(self._accumulated, gradient, entry.weight * entry.scale, first=not self._weight)
        self._weight += entry.weight
        self._damping += entry.weight * entry.damping
        self.group[entry.worker] = self.group.get(entry.worker, 0) + 1

    def copy_point(self, point: Point, out: Tensor | Quanta) -> tuple[int, int]:
        """Writes a point into `out`, flat [numel] of a dtype in DTYPES or int8, on the host; returns (epoch, step)."""
        if isinstance(out, Quanta):
            quantize(self._method, self._layout, self._hyperparameters, self._buffers, point, out)
        else:
            interpolate(self._method, self._layout, self._hyperparameters, self._buffers, point, out)
        return self.epoch, self.step

    def position(self) -> tuple[int, int, dict[str, int]]:
        """(seq, step, group): where in the log the state stands."""
        return self.seq, self.step, dict(self.group)

    def cut(self) -> Cut:
        """A copy of the state; its cost is one pass over memory."""
        tensors = dict(self._buffers)
        if self.group and self._accumulated is not None:
            tensors["accumulated"] = self._accumulated
        return Cut(
            self.epoch,
            self.step,
            self.seq,
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
            dict(self._scalars),
            dict(self.group),
            self._weight,
            self._damping,
        )

    def load(self, cut: Cut, epoch: int) -> None:
        """Takes a cut's state, and its tensors, as this shard's, in the given epoch."""
        self.epoch, self.step, self.seq = epoch, cut.step, cut.seq
        self._buffers = {name: cut.tensors[name].to(self.device) for name in self._method.buffers}
        self._scalars = dict(cut.scalars)
        self._accumulated = cut.tensors["accumulated"].to(self.device) if cut.group else None
        self.group = dict(cut.group)
        self._weight, self._damping = cut.weight, cut.damping
