"""A shard: its stretch of a run's state vectors and what happens to them, one log entry after another.

The law of this file: no IO, no clock, no lock. It is a function of the entries applied to it, in the order of the
log, and of nothing else; whoever calls it sees to it that one thread does so at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freestep.api.models import Point, RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control, ControlChange, Orders
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.delay import Expectation
from freestep_service.domain.norm_history import Norm, NormHistory
from freestep_service.domain.reports import Measured, Reported, with_measured
from freestep_service.domain.tally import NOTHING_COUNTED, Tally
from freestep_service.optimizers import (
    Buffers,
    Conditions,
    Gradient,
    Method,
    Pushed,
    Quanta,
    Quantized,
    Scalars,
    Segment,
    gather,
    initial_buffers,
    interpolate,
    method_of,
    quantize,
    segments,
    step,
)
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.readiness import compile_kernels, compile_robust, compile_rule
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import HOST
from freestep_service.state.kept_pushes import KeptPushes
from freestep_service.state.log import Entry
from freestep_service.state.views import Copying, PointView
from freestep_service.state.weighing import weighed

__all__ = ["DTYPES", "Shard", "StateCopy", "hyperparameters_of", "scheduled_rates", "write_point"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's names of the dtypes that travel as they are."""


@dataclass(frozen=True)
class StateCopy:
    """A shard's whole state between two entries of the log, in memory of its own."""

    epoch: int
    step: int
    seq: int
    tensors: dict[str, Tensor]
    """The state vectors by name, and what pushes have been gathered in: `accumulated`, or `pushed.0`, `pushed.1`, ...
    where they are kept apart; on the CPU."""
    scalars: dict[str, Scalars]
    group: dict[str, int]
    weight: float
    damping: float
    reported: Reported = field(default_factory=dict)
    lateness: int = 0
    expected_staleness: float = 0.0
    loss: float = 0.0
    tally: Tally = NOTHING_COUNTED
    """What had been counted of the run's pushes: applied and accumulated ones in this state and in those before it."""
    norm_history: NormHistory = field(default_factory=NormHistory)
    data: DataSets = field(default_factory=DataSets)
    control: Control = field(default_factory=Control)


class Shard:
    """The state of a stretch of one run's parameters, as of log entry `seq` and step `step` of epoch `epoch`."""

    def __init__(
        self, spec: RunSpec, manifest: Manifest, device: torch.device, room: int = 0, *, is_part: bool = False
    ) -> None:
        """room: bytes that a vector which takes y's place may have beside those of its elements.

        is_part: whether the run has other shards.
        """
        self.manifest = manifest
        self.device = device
        self.epoch = self.step = self.seq = 0
        self._method = method_of(spec.optimizer)
        self._layout = segments(self.manifest.slots)
        # All of the run's groups, so that the scalars of any one shard are those of every other.
        self._groups = spec.group_names()
        policy = Policy.of(spec.aggregation)
        self._kept = KeptPushes(spec.aggregation, policy.kept, manifest.numel, device) if policy.kept else None
        self.needs_distances = is_part and spec.aggregation.robust == "krum"
        """Whether an entry that makes an update has to hold the distances between its pushes over all shards."""
        self._sealed = spec
        self._control = Control()
        self._follow(spec)
        self._norm_history = NormHistory()
        self._data = DataSets()
        self._expected_staleness = 0.0
        self._tally = NOTHING_COUNTED
        self._buffers: dict[str, Tensor] = {}
        self._room = room
        self._home: Vector | None = None
        """Where y lies, if that is on the host."""
        self._lent: PointView | None = None
        self._scalars: dict[str, Scalars] = {}
        self._reported: Reported = {}
        self._accumulated: Tensor | None = None
        self._clear_group()

    def _follow(self, spec: RunSpec) -> None:
        """From here on, this spec is in force."""
        self.spec = spec
        """The one in force: as the run was created, with what was changed since."""
        self._hyperparameters = hyperparameters_of(spec)
        self.policy = policy = Policy.of(spec.aggregation)
        """That of the spec in force."""
        self._gathers = policy.groups and not policy.kept
        self._is_robust, self._ban_after = spec.aggregation.robust != "none", spec.aggregation.ban_after
        self._expectation = Expectation.of(spec)

    def prepare(self, spec: RunSpec | None = None) -> None:
        """Has ready what a step takes, so that no entry waits for it. The first time on a machine it takes seconds.

        spec: the one that will be in force; None for the one that is.
        """
        spec = spec or self.spec
        hyperparameters, gathers = hyperparameters_of(spec), Policy.of(spec.aggregation).groups
        if self.device == HOST:
            compile_rule(next(iter(hyperparameters.values())), gathers=gathers and self._kept is None)
            if self._kept is not None:
                compile_robust()
        else:
            compile_kernels(self._method, self._layout, hyperparameters, self.device, gathers=gathers)

    def _clear_group(self) -> None:
        self.group: dict[str, int] = {}
        self._weight = 0.0
        self._damping = 0.0
        self._lateness = 0
        self._loss = 0.0
        if self._kept is not None:
            self._kept.load([])
        self._leave_unneeded()

    def _leave_unneeded(self) -> None:
        """Gives up the vector that pushes were gathered in, where none will be."""
        if not self._gathers and not self._weight:
            self._accumulated = None

    def initialize(self, parameters: Tensor, epoch: int) -> None:
        """Starts at step 0 from the initial weights, flat [numel], fp32 or narrower, which are copied."""
        self.epoch, self.step, self.seq = epoch, 0, 0
        self._buffers = initial_buffers(self._method, self._as_y(parameters))
        self._scalars = dict.fromkeys(self._hyperparameters, self._method.initial)
        self._reported = {}
        self._norm_history = NormHistory()
        self._data = DataSets()
        self._take_control(Control())
        self._expected_staleness = 0.0
        self._clear_group()
        settle(self.device)

    def clear(self) -> None:
        """Forgets the state: the shard waits for initial weights."""
        self.epoch = self.step = self.seq = 0
        self._buffers, self._home, self._lent = {}, None, None
        self._scalars = {}
        self._reported = {}
        self._norm_history = NormHistory()
        self._data = DataSets()
        self._take_control(Control())
        self._accumulated = None
        self._expected_staleness = 0.0
        self._clear_group()

    def apply(self, entry: Entry) -> None:
        """Applies the log's next entry.

        A group's gradient is the mean of its pushes weighted by their samples, and its damping and loss likewise; it
        is as late as the latest of them. A robust rule takes its place where there is one. An entry that changes the
        run does so before the update that it may make.
        """
        assert (entry.epoch, entry.seq) == (self.epoch, self.seq + 1), "entries come in the order of the log"
        self.seq = entry.seq
        if entry.record is not None:
            self._tally = self._tally.counting(entry.record.decision)
        if entry.control is not None:
            self._change(entry.control)
        if not entry.is_weighed:
            entry = weighed(self.spec, entry)
        if entry.data is not None:
            self._data.add(entry.data)
        self._data.count(entry.units, advance=entry.advance)
        if entry.measured is not None:
            self._observe(entry.measured)
        if entry.norm is not None and self._is_robust:
            norm = Norm(entry.worker, entry.norm, entry.is_outlier)
            self._norm_history = self._norm_history.after(norm, self._ban_after)
        if entry.gradient is None and not entry.advance:
            return
        pushed = self._pushed(entry)
        if pushed is not None:
            self._expected_staleness = self._expectation.after(self._expected_staleness, entry.staleness, entry.live)
        if not entry.advance:
            assert pushed is not None
            self._gather(pushed, entry)
            return
        gradient, taken = self._direction(pushed, entry)
        taken = taken._replace(expected_staleness=self._expected_staleness)
        self._leave_lent()
        self._scalars = step(
            self._method, self._layout, self._hyperparameters, self._scalars, self._buffers, gradient, taken
        )
        self.step += 1
        self._clear_group()

    def square_distances(self, entry: Entry) -> Tensor:
        """Those between the pushes of the update that the log's next entry makes, within this shard; changes nothing.

        They are as `KeptPushes.square_distances` has them.
        """
        assert (entry.epoch, entry.seq) == (self.epoch, self.seq + 1), "entries come in the order of the log"
        assert self._kept is not None
        entry = entry if entry.is_weighed else weighed(self.spec, entry)
        return self._kept.square_distances(self._pushed(entry), entry.scale)

    def _pushed(self, entry: Entry) -> Pushed | None:
        """The gradient of an entry where the shard takes it from."""
        pushed = entry.gradient
        return pushed if pushed is None or isinstance(pushed, Quantized) else pushed.to(self.device)

    def _change(self, change: ControlChange) -> None:
        before = self._hyperparameters
        self._take_control(change.after(self._control))
        self._scalars = {
            group: self._method.retune(before[group], self._hyperparameters[group], scalars)
            for group, scalars in self._scalars.items()
        }
        self._leave_unneeded()

    def _take_control(self, control: Control) -> None:
        if control != self._control:
            self._control = control
            self._follow(control.in_force(self._sealed))

    def operate(self, orders: Orders) -> None:
        """Has other orders hold, where the run goes back to an earlier state."""
        self._control = self._control.under(orders)

    def control(self) -> Control:
        """What is changed of the run up to here."""
        return self._control

    def _observe(self, measured: Measured) -> None:
        self._reported = with_measured(self._reported, measured)
        self._scalars = {
            group: self._method.observe(self._hyperparameters[group], scalars, measured.name, measured.value)
            for group, scalars in self._scalars.items()
        }

    def _gather(self, pushed: Pushed, entry: Entry) -> None:
        if self._kept is not None:
            self._kept.add(pushed, entry.scale)
        else:
            if self._accumulated is None:
                self._accumulated = torch.empty(self.manifest.numel, dtype=torch.float32, device=self.device)
            gather(self._accumulated, pushed, entry.weight * entry.scale, first=not self._weight)
        self._weight += entry.weight
        self._damping += entry.weight * entry.damping
        self._lateness = max(self._lateness, entry.lateness)
        self._loss += entry.weight * entry.loss
        self.group[entry.worker] = self.group.get(entry.worker, 0) + 1

    def _direction(self, pushed: Pushed | None, entry: Entry) -> tuple[Gradient, Conditions]:
        """The gradient of the step that an entry brings about, and what the log says of its pushes."""
        if self._kept is not None:
            if pushed is not None:
                self._gather(pushed, entry)
            taken = _conditions(self._damping / self._weight, self._lateness, self._loss / self._weight)
            assert not self.needs_distances or entry.distances is not None
            return self._kept.combine(entry.distances), taken
        if not self._gathers and not self._weight:
            assert pushed is not None
            return Gradient(pushed, entry.scale), _conditions(entry.damping, entry.lateness, entry.loss)
        if pushed is None:
            assert self._accumulated is not None
            taken = _conditions(self._damping / self._weight, self._lateness, self._loss / self._weight)
            return Gradient(self._accumulated, 1 / self._weight), taken
        weight = self._weight + entry.weight
        gathered = self._accumulated if self._weight else None
        damping = (self._damping + entry.weight * entry.damping) / weight
        loss = (self._loss + entry.weight * entry.loss) / weight
        taken = _conditions(damping, max(self._lateness, entry.lateness), loss)
        return Gradient(pushed, 1 / weight, entry.weight * entry.scale, gathered), taken

    def copy_point(
        self, point: Point, out: Tensor | Quanta, note: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """Writes a point into `out`, flat [numel] of a dtype in DTYPES or int8, on the host; returns (epoch, step).

        note: as `interpolate` has it.
        """
        write_point(self._method, self._layout, self._hyperparameters, self._scalars, self._buffers, point, out, note)
        return self.epoch, self.step

    def lend(self, spare: Vector) -> PointView:
        """y as it is now, in the state's own memory; where that is lent already, or on a device, copied to `spare`."""
        if self._home is None or (self._lent is not None and self._lent.is_open):
            spare.pin()
            self.copy_point("y", spare.tensor())
            return self.view(spare)
        self._lent = self.view(self._home, spare)
        return self._lent

    def view(self, vector: Vector, spare: Vector | None = None, copying: Copying | None = None) -> PointView:
        """A view of the state as it is now, of which a point is in `vector`; the other arguments are PointView's."""
        return PointView(self.epoch, self.step, self.scheduled_lr, vector, spare, copying)

    def _leave_lent(self) -> None:
        """Has y in memory that nobody reads."""
        view, self._lent = self._lent, None
        spare = None if view is None else view.take_spare()
        if spare is not None:
            self.copy_point("y", spare.tensor())
            self._home, self._buffers["y"] = spare, spare.tensor()

    def _as_y(self, parameters: Tensor) -> Tensor:
        """A copy of `parameters`, flat [numel], on the device and as fp32, to be y."""
        self._lent = None
        if self.device != HOST:
            return parameters.to(self.device, torch.float32, copy=True)
        self._home = Vector(self.manifest.numel, self._room)
        return self._home.tensor().copy_(parameters)

    def position(self) -> tuple[int, int, dict[str, int]]:
        """(seq, step, group): where in the log the state stands."""
        return self.seq, self.step, dict(self.group)

    @property
    def scheduled_lr(self) -> tuple[float, ...] | None:
        """The learning rate of the newest step by param group, in the order of the spec's `group_names`.

        None before the first step, and after it where the state was written by an older version.
        """
        return scheduled_rates(self._groups, self._scalars)

    def reported(self) -> Reported:
        """The metrics that were reported up to here."""
        return self._reported

    def norm_history(self) -> NormHistory:
        """What is remembered of the pushes up to here, under a robust rule."""
        return self._norm_history

    def tally(self) -> Tally:
        """What is counted of the run's pushes up to here."""
        return self._tally

    def count_on(self, tally: Tally) -> None:
        """Counts from here on to what the run has counted before, of states that it has given up too."""
        self._tally = tally

    def data(self) -> DataSets:
        """How much of the run's data sets has counted up to here."""
        return self._data.copy()

    @property
    def is_elementwise(self) -> bool:
        """Whether an update takes a few operations an element: no direction of matrices, no comparison of pushes."""
        return self._method.direction is None and self._kept is None

    @property
    def gathered_vectors(self) -> int:
        """How many vectors pushes are gathered in, or may be."""
        return max(self.policy.gathered_vectors, int(self._accumulated is not None))

    def state_bytes(self, gathered: int) -> int:
        """Bytes that a copy of the state may take, with so many vectors that pushes are gathered in."""
        return 4 * self.manifest.numel * (len(self._method.buffers) + gathered)

    def copy_state(self) -> StateCopy:
        """A copy of the state; its cost is one pass over memory."""
        tensors = dict(self._buffers)
        if self._kept is not None:
            tensors |= {f"pushed.{number}": kept for number, kept in enumerate(self._kept.tensors())}
        elif self.group and self._accumulated is not None:
            tensors["accumulated"] = self._accumulated
        return StateCopy(
            self.epoch,
            self.step,
            self.seq,
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
            dict(self._scalars),
            dict(self.group),
            self._weight,
            self._damping,
            self._reported,
            self._lateness,
            self._expected_staleness,
            self._loss,
            self._tally,
            norm_history=self._norm_history,
            data=self._data.copy(),
            control=self._control,
        )

    def load(self, cut: StateCopy, epoch: int) -> None:
        """Takes a cut's state, and its tensors, as this shard's, in the given epoch."""
        self.epoch, self.step, self.seq = epoch, cut.step, cut.seq
        kept = {name: cut.tensors[name].to(self.device) for name in self._method.buffers if name != "y"}
        self._buffers = {"y": self._as_y(cut.tensors["y"]), **kept}
        self._scalars = dict(cut.scalars)
        self.group = dict(cut.group)
        if self._kept is not None:
            self._kept.load([cut.tensors[f"pushed.{number}"] for number in range(sum(cut.group.values()))])
        else:
            self._accumulated = cut.tensors["accumulated"].to(self.device) if cut.group else None
        self._weight, self._damping = cut.weight, cut.damping
        self._lateness, self._loss = cut.lateness, cut.loss
        self._expected_staleness = cut.expected_staleness
        self._reported = cut.reported
        self._tally = cut.tally
        self._norm_history = cut.norm_history
        self._data = cut.data.copy()
        self._take_control(cut.control)


def hyperparameters_of(spec: RunSpec) -> dict[str, Any]:
    """By param group, in the order of names."""
    return {group: spec.hyperparameters(group) for group in sorted(spec.group_names())}


def scheduled_rates(groups: Iterable[str], scalars: Mapping[str, Scalars]) -> tuple[float, ...] | None:
    """The learning rate of the newest step by param group, in the order of `groups`; None where scalars have none."""
    try:
        return tuple([scalars[group]["scheduled_lr"] for group in groups])
    except KeyError:
        return None


def write_point(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    point: Point,
    out: Tensor | Quanta,
    note: Callable[[int], object] | None = None,
) -> None:
    """Writes a point of a state into `out`, as `Shard.copy_point` has it; the other arguments are `interpolate`'s."""
    state = method, layout, hyperparameters, scalars, buffers
    if isinstance(out, Quanta):
        quantize(*state, point, out)
    else:
        interpolate(*state, point, out, note)


def _conditions(damping: float, lateness: int, loss: float) -> Conditions:
    return Conditions(damping, 1 / lateness if lateness else math.inf, loss=loss)
