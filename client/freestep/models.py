"""The JSON of the control plane: what is asked of the service and what it answers.

Hyperparameters keep the names and defaults of the `schedulefree` package and of `torch.optim`. Unknown
members are refused everywhere: a misspelt hyperparameter must not train a different model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

__all__ = [
    "ALGORITHMS",
    "DEFAULT_GROUP",
    "MOST_SHARDS",
    "SGD",
    "AdamW",
    "AdamWScheduleFree",
    "AggregationSpec",
    "Checkpoint",
    "CheckpointList",
    "Dtype",
    "GroupOverrides",
    "Lease",
    "LeaseList",
    "LeaseRequest",
    "OptimizerSpec",
    "ParameterSpec",
    "Point",
    "PointDtype",
    "RAdamScheduleFree",
    "Receipt",
    "ReshardRequest",
    "RunList",
    "RunSpec",
    "RunStatus",
    "SGDScheduleFree",
    "Schedule",
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

_LARGEST_INTEGER = 2**53 - 1
"""Beyond it a double, which is what JSON readers and Lua have, skips integers."""

_Name = Annotated[str, Field(min_length=1, max_length=512)]
_NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e12)]
"""At most 1e12, so that no coefficient of a step overflows fp32."""
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Epsilon = Annotated[float, Field(strict=True, ge=1e-30, le=1e12)]
"""Not so small that fp32 takes it for zero, which would divide 0 by 0 where a gradient is 0."""
_Power = Annotated[float, Field(strict=True, ge=0, le=10)]
"""At most 10, so that Σ (k+1)^r · γ^weight_lr_power stays a double however long the run."""
_Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST_INTEGER)]
_Coefficient = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A decay rate that may be off: 0 <= value < 1."""
_Interpolation = Annotated[float, Field(strict=True, ge=1e-6, lt=1)]
"""Schedule-Free's β: x = y + (1 - 1/β)(z - y) divides by it, and below 1e-6 fp32 keeps nothing of x."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Model):
    """The baselines' learning-rate schedule; constant after a linear warmup."""

    name: Literal["constant"] = "constant"
    warmup_steps: _Count = 0


class _Hyperparameters(_Model):
    max_grad_norm: _Positive | None = None
    """Each push's gradient is scaled to at most this 2-norm, taken over all parameters of the run."""


class SGDScheduleFree(_Hyperparameters):
    """Schedule-Free SGD, arXiv 2405.15682, as `schedulefree.SGDScheduleFree`."""

    algorithm: Literal["sgd_schedule_free"] = "sgd_schedule_free"
    lr: _NonNegative = 1.0
    momentum: _Interpolation = 0.9
    weight_decay: _NonNegative = 0.0
    warmup_steps: _Count = 0
    r: _Power = 0.0
    weight_lr_power: _Power = 2.0


class AdamWScheduleFree(_Hyperparameters):
    """Schedule-Free AdamW, arXiv 2405.15682, as `schedulefree.AdamWScheduleFree`."""

    algorithm: Literal["adamw_schedule_free"] = "adamw_schedule_free"
    lr: _NonNegative = 0.0025
    betas: tuple[_Interpolation, _Coefficient] = (0.9, 0.999)
    eps: _Epsilon = 1e-8
    weight_decay: _NonNegative = 0.0
    warmup_steps: _Count = 0
    r: _Power = 0.0
    weight_lr_power: _Power = 2.0


class RAdamScheduleFree(_Hyperparameters):
    """Schedule-Free RAdam, as `schedulefree.RAdamScheduleFree`; the rectification is arXiv 1908.03265's."""

    algorithm: Literal["radam_schedule_free"] = "radam_schedule_free"
    lr: _NonNegative = 0.0025
    betas: tuple[_Interpolation, _Interpolation] = (0.9, 0.999)
    eps: _Epsilon = 1e-8
    weight_decay: _NonNegative = 0.0
    r: _Power = 0.0
    weight_lr_power: _Power = 2.0
    silent_sgd_phase: Annotated[bool, Field(strict=True)] = True


class SGD(_Hyperparameters):
    """Stochastic gradient descent, as `torch.optim.SGD`."""

    algorithm: Literal["sgd"] = "sgd"
    lr: _NonNegative = 0.001
    momentum: _Coefficient = 0.0
    dampening: _NonNegative = 0.0
    weight_decay: _NonNegative = 0.0
    nesterov: Annotated[bool, Field(strict=True)] = False
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise _at(("nesterov",), "Nesterov momentum needs momentum above 0 and dampening 0")
        return self


class AdamW(_Hyperparameters):
    """Adam with decoupled weight decay, arXiv 1711.05101, as `torch.optim.AdamW`."""

    algorithm: Literal["adamw"] = "adamw"
    lr: _NonNegative = 0.001
    betas: tuple[_Coefficient, _Coefficient] = (0.9, 0.999)
    eps: _Epsilon = 1e-8
    weight_decay: _NonNegative = 0.01
    schedule: Schedule = Schedule()


OptimizerSpec = Annotated[
    SGDScheduleFree | AdamWScheduleFree | RAdamScheduleFree | SGD | AdamW,
    Field(discriminator="algorithm"),
]

ALGORITHMS: dict[str, type[SGDScheduleFree | AdamWScheduleFree | RAdamScheduleFree | SGD | AdamW]] = {
    "sgd_schedule_free": SGDScheduleFree,
    "adamw_schedule_free": AdamWScheduleFree,
    "radam_schedule_free": RAdamScheduleFree,
    "sgd": SGD,
    "adamw": AdamW,
}
"""Each algorithm's hyperparameters, by its name."""

GroupOverrides = dict[str, Any]
"""Hyperparameters of one param group that differ from the run's."""


class AggregationSpec(_Model):
    """How pushes become updates: a named policy, whose own values the given fields overrule.

    An update is made of `batch` pushes, and a push is admitted while its staleness, in steps, is at most
    `max_staleness`. Under `sync` and `quorum` a worker contributes once to an update.
    """

    policy: Literal["async", "ringmaster", "sync", "quorum", "buffered", "rennala"] = "ringmaster"
    batch: Annotated[int, Field(strict=True, ge=1, le=_LARGEST_INTEGER)] | None = None
    max_staleness: _Count | None = None
    staleness_damping: Literal["none", "delay_adaptive", "inverse_sqrt"] = "none"

    @model_validator(mode="after")
    def _needs_a_batch(self) -> AggregationSpec:
        if self.policy in ("quorum", "buffered", "rennala") and self.batch is None:
            raise _at(("batch",), f"the policy {self.policy} needs a batch")
        return self


class ParameterSpec(_Model):
    """One tensor of the manifest; `shape` [] is a scalar, and a dimension of 0 makes it empty."""

    name: _Name
    shape: tuple[Annotated[int, Field(strict=True, ge=0, le=2**48)], ...] = Field(max_length=64)
    group: _Name = DEFAULT_GROUP

    @model_validator(mode="after")
    def _not_reserved(self) -> ParameterSpec:
        if self.name == "__metadata__":
            raise _at(("name",), "the safetensors format reserves the name __metadata__")
        return self


class RunSpec(_Model):
    """What a run is: its optimizer, its aggregation, and the manifest of its parameters."""

    optimizer: OptimizerSpec
    aggregation: AggregationSpec = AggregationSpec()
    parameters: tuple[ParameterSpec, ...] = Field(min_length=1)
    groups: dict[_Name, GroupOverrides] = {}
    lease_ttl_ms: Annotated[int, Field(strict=True, ge=100, le=3_600_000)] = 30_000
    durability: Literal["none", "checkpoint"] = "checkpoint"
    shards: Annotated[int, Field(strict=True, ge=1, le=MOST_SHARDS)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        names: set[str] = set()
        for index, parameter in enumerate(self.parameters):
            if parameter.name in names:
                raise _at(("parameters", index, "name"), f"the name {parameter.name!r} stands twice")
            names.add(parameter.name)
            if parameter.group not in self.groups and parameter.group != DEFAULT_GROUP:
                raise _at(("parameters", index, "group"), f"there is no group {parameter.group!r}")
        for group in self.groups:
            self.hyperparameters(group)
        return self

    def hyperparameters(self, group: str) -> OptimizerSpec:
        """The hyperparameters of a param group: the run's, with the group's own in their place."""
        overrides = self.groups.get(group, {})
        for name in ("algorithm", "max_grad_norm"):
            if name in overrides:
                raise _at(("groups", group, name), f"{name} belongs to the run, not to a group")
        merged = {**self.optimizer.model_dump(), **overrides}
        try:
            return type(self.optimizer).model_validate(merged)
        except ValidationError as error:
            first = error.errors()[0]
            raise _at(("groups", group, *first["loc"]), first["msg"]) from None


def _at(field: tuple[str | int, ...], message: str) -> ValidationError:
    """A validation error that names a field deeper than the model being validated."""
    reason = PydanticCustomError("invalid", "{message}", {"message": message})
    detail = InitErrorDetails(type=reason, loc=field, input=None)
    return ValidationError.from_exception_data("freestep", [detail])


class LeaseRequest(_Model):
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
    """A live worker: when its lease ends, and what it last pushed."""

    worker: str
    lease: str
    token: int
    ttl_ms: int
    expires_in_ms: int
    pushes: int = 0
    step: int | None = None
    staleness: int | None = None


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
    """A run at this moment. `loss` and `staleness` are moving averages over recent pushes."""

    run: str
    epoch: int
    step: int
    initialized: bool
    spec: RunSpec
    workers: list[WorkerStatus]
    pushes: dict[str, int]
    loss: float | None = None
    staleness: float | None = None
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


class ReshardRequest(_Model):
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
