"""The JSON of the control plane: what is asked of the service and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from freestep.api.hyperparameters import OptimizerSpec
from freestep.api.validation import LARGEST_INTEGER, Count, MetricName, StrictModel, fault

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
    "RunList",
    "RunSpec",
    "RunStatus",
    "ShardStatus",
    "Slice",
    "Topology",
    "WorkerStatus",
]

DEFAULT_GROUP = "default"

MOST_SHARDS = 256
"""Shards of one run."""

Point = Literal["x", "y", "z"]
Dtype = Literal["F32", "BF16", "F16"]
"""Of tensors that travel as they are."""
PointDtype = Literal[Dtype, "I8"]
"""Of points: I8 is int8 and a scale for each block."""

_Name = Annotated[str, Field(min_length=1, max_length=512)]

GroupOverrides = dict[str, Any]
"""Hyperparameters of one param group that differ from the run's."""


class AggregationSpec(StrictModel):
    """How pushes become updates: a named policy, whose own values the given fields overrule.

    An update is made of `batch` pushes, and a push is admitted while its staleness, in steps, is at most
    `max_staleness`. Under `sync` and `quorum` a worker contributes once to an update. Under `ssp`, or where `slack` is
    given, a worker that is more than `slack` pushes ahead of the slowest live one waits.
    """

    policy: Literal["async", "ringmaster", "sync", "quorum", "buffered", "rennala", "ssp"] = "ringmaster"
    batch: Annotated[int, Field(strict=True, ge=1, le=LARGEST_INTEGER)] | None = None
    max_staleness: Count | None = None
    slack: Count | None = None
    staleness_damping: Literal["none", "delay_adaptive", "inverse_sqrt", "fadas"] = "none"
    staleness_threshold: Count | None = None
    """τ_c of `fadas`: staler steps have a learning rate of at most 1/τ."""

    @model_validator(mode="after")
    def _complete(self) -> AggregationSpec:
        if self.policy in ("quorum", "buffered", "rennala") and self.batch is None:
            raise fault(("batch",), f"the policy {self.policy} needs a batch")
        if self.policy == "ssp" and self.slack is None:
            raise fault(("slack",), "the policy ssp needs a slack")
        if (self.staleness_damping == "fadas") != (self.staleness_threshold is not None):
            raise fault(("staleness_threshold",), "the staleness damping fadas needs a threshold, and no other has one")
        return self


class ParameterSpec(StrictModel):
    """One tensor of the manifest; `shape` [] is a scalar, and a dimension of 0 makes it empty."""

    name: _Name
    shape: tuple[Annotated[int, Field(strict=True, ge=0, le=2**48)], ...] = Field(max_length=64)
    group: _Name = DEFAULT_GROUP

    @model_validator(mode="after")
    def _not_reserved(self) -> ParameterSpec:
        if self.name == "__metadata__":
            raise fault(("name",), "the safetensors format reserves the name __metadata__")
        return self


class RunSpec(StrictModel):
    """What a run is: its optimizer, its aggregation, and the manifest of its parameters."""

    optimizer: OptimizerSpec
    aggregation: AggregationSpec = AggregationSpec()
    parameters: tuple[ParameterSpec, ...] = Field(min_length=1)
    groups: dict[_Name, GroupOverrides] = Field(default_factory=dict)
    lease_ttl_ms: Annotated[int, Field(strict=True, ge=100, le=3_600_000)] = 30_000
    durability: Literal["none", "checkpoint"] = "checkpoint"
    shards: Annotated[int, Field(strict=True, ge=1, le=MOST_SHARDS)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        names: set[str] = set()
        for index, parameter in enumerate(self.parameters):
            if parameter.name in names:
                raise fault(("parameters", index, "name"), f"the name {parameter.name!r} stands twice")
            names.add(parameter.name)
            if parameter.group not in self.groups and parameter.group != DEFAULT_GROUP:
                raise fault(("parameters", index, "group"), f"there is no group {parameter.group!r}")
        whole = self.whole_groups()
        for index, parameter in enumerate(self.parameters):
            if parameter.group in whole and len(parameter.shape) != 2:
                raise fault(
                    ("parameters", index, "shape"), "its group's base takes matrices; that of others may be adamw"
                )
        if self.optimizer.needs_loss and self.shards > 1:
            raise fault(
                ("shards",), "the algorithm's step size needs sums over all parameters, and has them in one shard"
            )
        return self

    def whole_groups(self) -> set[str]:
        """The param groups whose tensors a step takes whole, so that no shard may have a part of one."""
        return {group for group in (DEFAULT_GROUP, *self.groups) if self.hyperparameters(group).takes_matrices}

    def hyperparameters(self, group: str) -> OptimizerSpec:
        """The hyperparameters of a param group: the run's, with the group's own in their place."""
        try:
            return self.optimizer.overruled(self.groups.get(group, {}))
        except ValidationError as error:
            first = error.errors()[0]
            raise fault(("groups", group, *first["loc"]), first["msg"]) from None


class LeaseRequest(StrictModel):
    """Asks for a lease; a worker's newer lease fences off its older one."""

    worker: Annotated[str, Field(min_length=1, max_length=200)]
    ttl_ms: Annotated[int, Field(strict=True, ge=100, le=3_600_000)] | None = None


class _Answer(BaseModel):
    """What the service says; a newer service may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Lease(_Answer):
    """A worker's lease: `token` is the fencing token, `epoch` and `step` the run's at the grant or renewal."""

    lease: str
    token: int
    worker: str
    ttl_ms: int
    epoch: int
    step: int


class LeaseList(_Answer):
    leases: list[WorkerStatus]


class WorkerStatus(_Answer):
    """A live worker: when its lease ends, and what it last pushed.

    speed: the steps that it takes by itself in a second, if a push has said so.
    """

    worker: str
    lease: str
    token: int
    ttl_ms: int
    expires_in_ms: int
    pushes: int = 0
    step: int | None = None
    staleness: int | None = None
    speed: float | None = None


class MetricReport(StrictModel):
    """What an evaluator has measured at x: `step` is that of the x, and `epoch` too where it is given."""

    name: MetricName
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    step: Count
    epoch: Count | None = None


class MetricReceipt(_Answer):
    """What became of a report: `replayed` says that the same one had counted before."""

    name: str
    value: float
    step: int
    epoch: int
    replayed: bool = False


class Metric(_Answer):
    """The value of a metric, and the step of the x at which it was measured."""

    value: float
    step: int


class Receipt(_Answer):
    """What became of a push.

    `step` is the run's step after the decision, and `staleness` how many steps lay between the point where the
    gradient was taken and the point where it was applied. `reason` says why a push was dropped.
    """

    decision: Literal["applied", "accumulated", "dropped"]
    reason: str | None = None
    step: int
    staleness: int
    replayed: bool = False

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """One receipt of a push's parts, which differ where some were retried or not waited for: the furthest."""
        order = ("applied", "accumulated", "dropped")
        furthest = min(parts, key=lambda each: order.index(each.decision))
        step = max(each.step for each in parts)
        return furthest.model_copy(update={"step": step, "replayed": all(each.replayed for each in parts)})


class RunStatus(_Answer):
    """A run at this moment.

    `loss` and `staleness` are moving averages over recent pushes; `metrics` are those that evaluators have reported,
    each as of its newest step.
    """

    run: str
    epoch: int
    step: int
    initialized: bool
    spec: RunSpec
    workers: list[WorkerStatus]
    pushes: dict[str, int]
    loss: float | None = None
    staleness: float | None = None
    metrics: dict[str, Metric] = {}
    checkpoint_step: int | None = None
    parameter_count: int
    shards: int = 1


class RunList(_Answer):
    runs: list[RunStatus]


class Slice(_Answer):
    """What a shard owns of a tensor: elements `begin` to `end` of the flattened tensor.

    `shape` is what travels: [rows, ...] where these are whole rows, else [end - begin].
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int


class ShardStatus(_Answer):
    """A shard: elements `begin` to `end` of the run's flat vector, and the URL of the process that owns it.

    `url` is null while nobody does. `applied_step` is the newest step it has applied, `durable_step` the step of the
    newest checkpoint with this shard in it; null where there is none.
    """

    index: int
    url: str | None
    begin: int
    end: int
    slices: list[Slice]
    applied_step: int | None = None
    durable_step: int | None = None


class Topology(_Answer):
    """Where a run's shards are. `missing` are those that nobody owns: the run waits for them."""

    run: str
    epoch: int
    shards: list[ShardStatus]
    missing: list[int] = []


class ReshardRequest(StrictModel):
    """Asks for another number of shards."""

    shards: Annotated[int, Field(strict=True, ge=1, le=MOST_SHARDS)]


class Checkpoint(_Answer):
    """A checkpoint on disk; `created_at` is RFC 3339, `bytes` the size of its tensors."""

    step: int
    epoch: int
    created_at: str
    bytes: int


class CheckpointList(_Answer):
    checkpoints: list[Checkpoint]


LeaseList.model_rebuild()
