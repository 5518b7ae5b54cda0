"""The JSON of the control plane: requests to the service, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from freestep.api.aggregation import AggregationSpec
from freestep.api.control import RunControl, in_force
from freestep.api.data import DataProgress
from freestep.api.spec import DEFAULT_GROUP, MOST_SHARDS, GroupOverrides, ParameterSpec, RunSpec
from freestep.api.validation import Count, InPath, MetricName, StrictModel

__all__ = [
    "DEFAULT_GROUP",
    "MOST_SHARDS",
    "AggregationSpec",
    "Checkpoint",
    "CheckpointList",
    "Dtype",
    "GroupOverrides",
    "Lease",
    "LeaseList",
    "LeaseRequest",
    "Metric",
    "MetricReceipt",
    "MetricReport",
    "ParameterSpec",
    "Point",
    "PointDtype",
    "Receipt",
    "ReshardRequest",
    "RunControl",
    "RunList",
    "RunSpec",
    "RunStatus",
    "ShardStatus",
    "Slice",
    "Topology",
    "WorkerEnd",
    "WorkerStatus",
]

Point = Literal["x", "y", "z"]
"""x: the average; y: where gradients are taken; z: the base iterate."""
Dtype = Literal["F32", "BF16", "F16"]
"""The dtypes of tensors in bodies, by their names in safetensors."""
PointDtype = Literal[Dtype, "I8"]
"""The dtypes of points: I8 is int8 with a scale for each block of 256 elements."""


class LeaseRequest(StrictModel):
    """A request for a lease; a worker's newer lease replaces its older one."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"worker": "gpu-7"}]})

    worker: Annotated[str, Field(min_length=1, max_length=200), InPath]
    """The worker's name, which is not `.` or `..`."""
    ttl_ms: Annotated[int, Field(strict=True, ge=100, le=3_600_000)] | None = None
    """Milliseconds after which the lease ends if it is not renewed; null takes the run's `lease_ttl_ms`."""


class _Answer(BaseModel):
    """An answer of the service; unknown members, which newer services may add, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Lease(_Answer):
    """A worker's lease."""

    lease: str
    """The lease's ID."""
    token: int
    """The fencing token: higher than that of every older lease of the worker."""
    worker: str
    """The worker's name."""
    ttl_ms: int
    """Milliseconds after which the lease ends if it is not renewed."""
    epoch: int
    """The run's epoch at the grant or renewal; the lease is good in this epoch only."""
    step: int
    """The run's step at the grant or renewal."""


class LeaseList(_Answer):
    """The leases of a run."""

    leases: list[WorkerStatus]
    """The live workers."""


class WorkerStatus(_Answer):
    """A live worker and its lease."""

    worker: str
    """The worker's name."""
    lease: str | None = None
    """The lease's ID, for its holder alone, who names it when asking; else null."""
    token: int | None = None
    """The lease's fencing token, for its holder alone; else null."""
    ttl_ms: int
    """Milliseconds after which the lease ends if it is not renewed."""
    expires_in_ms: int
    """Milliseconds that are left."""
    pushes: int = 0
    """How many pushes the worker has made under this lease."""
    received_bytes: int = 0
    """Bytes of the bodies of these pushes."""
    gathered: int = 0
    """How many pushes of its are in the update that is being gathered."""
    step: int | None = None
    """The step of the y of its last push's gradient."""
    staleness: int | None = None
    """The staleness of its last push, in steps."""
    speed: float | None = None
    """Its local steps a second, as its pushes have reported; null if none has."""
    outliers: int = 0
    """How many of its pushes were outliers, under whatever lease; 0 if the run's `aggregation.robust` is `none`."""


class WorkerEnd(_Answer):
    """What became of a worker whose lease was to end."""

    worker: str
    """The worker's name."""
    ended: bool
    """Whether it had a lease, which has ended."""
    suspended_ms: int | None = None
    """Milliseconds for which it gets no other; null where that was not asked for."""


class MetricReport(StrictModel):
    """A metric that was measured at x."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "accuracy", "value": 0.93, "step": 40}]})

    name: MetricName
    """The metric's name."""
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    """Its value, finite."""
    step: Count
    """The step of the x at which it was measured."""
    epoch: Count | None = None
    """The epoch of that x; null takes the run's current epoch."""


class MetricReceipt(_Answer):
    """The outcome of a report."""

    name: str
    """The metric's name."""
    value: float
    """Its value."""
    step: int
    """The step of the x at which it was measured."""
    epoch: int
    """The epoch of that x."""
    replayed: bool = False
    """Whether the same report has counted before."""


class Metric(_Answer):
    """A metric's value at its newest step."""

    value: float
    """The value."""
    step: int
    """The step of the x at which it was measured."""


class Receipt(_Answer):
    """The outcome of a push."""

    decision: Literal["applied", "accumulated", "dropped"]
    """`applied`: an update with the gradient was made. `accumulated`: the gradient will be part of an update, with
    others that are still to come. `dropped`: it will not be applied."""
    reason: str | None = None
    """Why the push was dropped, such as `stale`, `duplicate-worker`, `norms-unknown` or `epoch-changed`; or `outlier`,
    if it was not dropped but its norm is that of an outlier (`aggregation.outlier_factor`)."""
    step: int
    """The run's step after the decision; after `applied`, the step that the gradient made."""
    staleness: int
    """How many steps the run had made since the y at which the gradient was computed."""
    replayed: bool = False
    """Whether the push was known already: it was sent again, and counted once."""

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """The receipt of a push to several shards, whose receipts differ if some were read later: the furthest one.

        Args:
            parts: The shards' receipts, at least one.
        """
        order = ("applied", "accumulated", "dropped")
        furthest = min(parts, key=lambda each: order.index(each.decision))
        step = max(each.step for each in parts)
        return furthest.model_copy(update={"step": step, "replayed": all(each.replayed for each in parts)})


class RunStatus(_Answer):
    """A run at this moment."""

    run: str
    """The run's name."""
    id: str | None = None
    """A random word, given when the run was created: another run of this name, here or elsewhere, has another. Null
    for a run of an older version."""
    epoch: int
    """The run's epoch; it rises when the run goes back to an earlier step or gets another number of shards."""
    step: int
    """The number of updates that have been applied."""
    initialized: bool
    """Whether the run has its initial weights."""
    spec: RunSpec
    """What the run was created with."""
    workers: list[WorkerStatus]
    """The live workers."""
    pushes: dict[str, int]
    """How many pushes have been `applied`, `accumulated` and `dropped`: also those before a restore, and not those that
    a crash has cost."""
    loss: float | None = None
    """A moving average of the losses that pushes have reported; null if none has."""
    staleness: float | None = None
    """A moving average of the pushes' staleness, in steps; null before the first push."""
    outliers: dict[str, int] = {}
    """How many pushes of a worker were outliers, by the worker's name, of workers with one at least."""
    banned: list[str] = []
    """The workers that get no lease any more (`aggregation.ban_after`)."""
    control: RunControl = RunControl()
    """What has been changed of the run since it was created, and whether it is paused."""
    metrics: dict[str, Metric] = {}
    """The metrics that evaluators have reported, by name."""
    data: dict[str, DataProgress] = {}
    """How much of the run's data sets has counted, by name."""
    scheduled_lr: dict[str, float] = {}
    """The learning rate that the newest update was made with, by param group; empty before the first. It is after
    warmup, schedules, Polyak steps and corrections for staleness, as `scheduled_lr` of the `schedulefree` package."""
    checkpoint_step: int | None = None
    """The step of the newest checkpoint; null if there is none."""
    parameter_count: int
    """The number of elements of all parameters."""
    shards: int = 1
    """The current number of shards."""

    @property
    def in_force(self) -> RunSpec:
        """The spec with what has been changed since: the hyperparameters and the policy of the next push."""
        return in_force(self.spec, self.control)


class RunList(_Answer):
    """The runs of a service, or a page of them."""

    runs: list[RunStatus]
    """Each run's status, by name."""
    next: str | None = None
    """The name after which the next page begins; null if there are no more."""


class Slice(_Answer):
    """The part of a tensor that a shard contains."""

    name: str
    """The tensor's name."""
    shape: tuple[int, ...]
    """The part's shape in bodies: [rows, ...] if it consists of whole rows, else [end - begin]."""
    begin: int
    """The part's first element in the flattened tensor."""
    end: int
    """The element after its last one."""


class ShardStatus(_Answer):
    """A shard: elements `begin` to `end` of the run's flat vector."""

    index: int
    """The shard's number, from 0."""
    url: str | None
    """The URL of the process that owns it; null while it has no owner."""
    begin: int
    """Its first element in the flat vector."""
    end: int
    """The element after its last one."""
    slices: list[Slice]
    """The parts of tensors that it contains."""
    applied_step: int | None = None
    """The newest step that it has applied; null if that is not known."""
    durable_step: int | None = None
    """The newest step that it returns to where its process ends and comes back: that of its newest checkpoint, or under
    durability `journal` the newest applied one; null if there is none."""
    journal: str | None = None
    """The host that has its journal, which outlives its process, and counts if it is back there or the directory is
    shared; null under other durabilities."""


class Topology(_Answer):
    """A run's shards and their owners."""

    run: str
    """The run's name."""
    epoch: int
    """The run's epoch."""
    shards: list[ShardStatus]
    """The shards, in order."""
    missing: list[int] = []
    """The numbers of the shards that have no owner, for which the run waits."""


class ReshardRequest(StrictModel):
    """A request for another number of shards."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"shards": 2}]})

    shards: Annotated[int, Field(strict=True, ge=1, le=MOST_SHARDS)]
    """The new number of shards."""


class Checkpoint(_Answer):
    """A checkpoint that is kept."""

    step: int
    """The run's step in it."""
    epoch: int
    """The epoch in which it was written."""
    created_at: str
    """When it was written, in the format of RFC 3339."""
    bytes: int
    """The size of its tensors, in bytes."""


class CheckpointList(_Answer):
    """The checkpoints of a run."""

    checkpoints: list[Checkpoint]
    """The checkpoints that are kept, oldest first."""


LeaseList.model_rebuild()
