"""Shards over the parts of a model hold what one shard over the whole holds, to the last bit.

A shard's state is a function of the log alone, so the shards are given the entries of a log directly, without a
service: every policy's kind of log, for every algorithm that a run of several shards may have. Hyperparameters and the
policy change on the way. Between two entries the shards may be replaced by another number of shards that load copies of
their state, as `reshard` does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freestep.api.control import ControlRequest
from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.aggregation import FRESH, LIVE, Policy
from freestep_service.domain.control import Control, ControlChange
from freestep_service.domain.distances import part_of, summed
from freestep_service.domain.reports import Measured
from freestep_service.state.compute import HOST
from freestep_service.state.shard import Entry, Shard, StateCopy
from run_specs import HYPERPARAMETERS, POLICIES, run_specs, wishes_for

STEADY = settings(
    derandomize=True, deadline=None, database=None, max_examples=10, suppress_health_check=list(HealthCheck)
)


@dataclasses.dataclass(frozen=True)
class Logged:
    """An entry of the log before its gradient is cut into the shards' parts.

    seed: of the push's gradient; None where a lease's end closes the update. reshard_to: the number of shards that
    take over before this entry; 0 where the present ones go on.
    """

    advance: bool
    seed: int | None = None
    dtype: torch.dtype = torch.float32
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reshard_to: int = 0


@st.composite
def logs(draw: st.DrawFn, spec: RunSpec) -> list[Logged]:
    """Logs such as the run's policy brings about."""
    control, log, gathered = Control(), [], 0
    wishes = wishes_for(spec)
    for _ in range(draw(st.integers(6, 24))):
        reshard_to = draw(st.sampled_from([0] * 9 + [1, 2, 3, 5]))
        kind = draw(st.sampled_from(["push"] * 8 + ["mark", "metric", "change", "change"]))
        policy = Policy.of(control.in_force(spec).aggregation)
        waits_for_live = policy.batch == LIVE
        if kind == "mark":
            log.append(Logged(False, fields={"checkpoint": True}, reshard_to=reshard_to))
        elif kind == "metric":
            measured = Measured("loss", len(log), draw(st.floats(0, 4)))
            log.append(Logged(False, fields={"measured": measured}, reshard_to=reshard_to))
        elif kind == "change":
            control = control.after(spec, ControlRequest(**draw(st.sampled_from(wishes))), f"key-{len(log)}")
            batch = Policy.of(control.in_force(spec).aggregation).batch
            is_last = batch != LIVE and gathered >= int(batch)
            log.append(Logged(is_last, fields={"control": ControlChange(control, "{}", "me")}, reshard_to=reshard_to))
            gathered = 0 if is_last else gathered
        elif gathered and waits_for_live and draw(st.integers(0, 3)) == 0:
            # The lease of the one worker that was waited for ends.
            log.append(Logged(True, reshard_to=reshard_to))
            gathered = 0
        else:
            live = draw(st.integers(1, 5))
            gathered += 1
            is_last = draw(st.booleans()) if waits_for_live else gathered >= int(policy.batch)
            is_last = is_last or gathered == policy.kept
            staleness = 0 if policy.max_staleness == FRESH else draw(st.integers(0, 6))
            fields = {
                "worker": f"worker-{draw(st.integers(0, 2))}",
                "is_weighed": False,
                "samples": draw(st.sampled_from([None, 3.0, 0.25])),
                "bound": draw(st.floats(0.1, 50)) if policy.bounds else None,
                "staleness": staleness,
                "live": live,
                "loss": draw(st.floats(0, 4)),
                "norm": draw(st.floats(0, 100)),
                "is_outlier": draw(st.booleans()),
            }
            dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
            log.append(Logged(is_last, draw(st.integers(0, 2**16)), dtype, fields, reshard_to))
            gathered = 0 if is_last else gathered
    return log


class Shards:
    """A run's state over any number of shards."""

    def __init__(self, spec: RunSpec, count: int) -> None:
        self._spec, self._whole = spec, Manifest.of(spec)
        self.shards = self._made(count)
        weights = torch.randn(self._whole.numel, generator=torch.Generator().manual_seed(7))
        for shard in self.shards:
            shard.initialize(weights[shard.manifest.begin : shard.manifest.end], epoch=1)

    def _made(self, count: int) -> list[Shard]:
        parts = [self._whole.part(index, count) for index in range(count)]
        return [Shard(self._spec, part, HOST, is_part=count > 1) for part in parts]

    def apply(self, logged: Logged) -> None:
        whole, entries = None, []
        if logged.seed is not None:
            generator = torch.Generator().manual_seed(logged.seed)
            whole = torch.randn(self._whole.numel, generator=generator).to(logged.dtype)
        for shard in self.shards:
            part = None if whole is None else whole[shard.manifest.begin : shard.manifest.end].clone()
            entries.append(Entry(shard.seq + 1, shard.epoch, logged.advance, part, **logged.fields))
        if logged.advance and self.shards[0].needs_distances:
            before = self.copy_state()
            parts = [shard.square_distances(entry) for shard, entry in zip(self.shards, entries, strict=True)]
            assert_same(before, self.copy_state())
            distances = summed(" ".join(map(part_of, parts)))
            entries = [dataclasses.replace(entry, distances=distances) for entry in entries]
        for shard, entry in zip(self.shards, entries, strict=True):
            shard.apply(entry)

    def copy_state(self) -> StateCopy:
        """The whole run's, of which the shards agree on all that is not cut into parts."""
        copies = [shard.copy_state() for shard in self.shards]
        (common,) = {repr(dataclasses.replace(each, tensors={})) for each in copies}
        assert common
        tensors = {name: torch.cat([each.tensors[name] for each in copies]) for name in copies[0].tensors}
        return dataclasses.replace(copies[0], tensors=tensors)

    def reshard(self, count: int) -> None:
        """Has other shards take over, from copies of these ones' state."""
        whole = self.copy_state()
        # As a checkpoint's manifest has it.
        written = json.loads(json.dumps(whole.control.members()))
        whole = dataclasses.replace(whole, control=Control.of_member(written.get("control", {})))
        self.shards = self._made(count)
        for shard in self.shards:
            stretch = slice(shard.manifest.begin, shard.manifest.end)
            tensors = {name: tensor[stretch].clone() for name, tensor in whole.tensors.items()}
            shard.load(dataclasses.replace(whole, tensors=tensors), whole.epoch)

    def point(self, point: str, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self._whole.numel, dtype=dtype)
        for shard in self.shards:
            shard.copy_point(point, out[shard.manifest.begin : shard.manifest.end])  # type: ignore[arg-type]
        return out


def assert_same(one: StateCopy, other: StateCopy) -> None:
    """To the last bit."""
    assert dataclasses.replace(one, tensors={}) == dataclasses.replace(other, tensors={})
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def compare(spec: RunSpec, count: int, log: Sequence[Logged]) -> None:
    """Applies a log to one shard and to several, which may become others in between."""
    one, many = Shards(spec, 1), Shards(spec, count)
    for logged in log:
        if logged.reshard_to:
            many.reshard(logged.reshard_to)
        for each in (one, many):
            each.apply(logged)
    for point in "xyz":
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(one.point(point, dtype), many.point(point, dtype))
    assert_same(one.copy_state(), many.copy_state())


def test_every_algorithm_that_may_have_several_shards_is_tried() -> None:
    assert HYPERPARAMETERS.keys() == {name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_loss}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algorithm", HYPERPARAMETERS)
def test_shards_are_as_one(algorithm: str, policy: str) -> None:
    @STEADY
    @given(data=st.data(), document=run_specs(algorithm, policy), count=st.integers(2, 5))
    def compared(data: st.DataObject, document: dict[str, Any], count: int) -> None:
        spec = RunSpec.model_validate(document)
        compare(spec, count, data.draw(logs(spec)))

    compared()
