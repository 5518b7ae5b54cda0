"""What a run is: its optimizer, its aggregation policy, and the manifest of its parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from freestep.api.aggregation import AggregationSpec
from freestep.api.hyperparameters import OptimizerSpec, ScheduleFreeWrapper
from freestep.api.validation import StrictModel, fault, first_fault

__all__ = [
    "DEFAULT_GROUP",
    "MOST_GROUPS",
    "MOST_PARAMETERS",
    "MOST_SHARDS",
    "Durability",
    "GroupOverrides",
    "ParameterSpec",
    "RunSpec",
]

DEFAULT_GROUP = "default"

MOST_SHARDS = 256
"""The largest number of shards of a run."""
MOST_PARAMETERS = 2**17
"""The largest number of tensors of a run."""
MOST_GROUPS = 1024
"""The largest number of param groups of a run: a header of each point has a number for each."""
_MOST_DISTANCES = 2**20
"""The most distances between pushes, of 8 bytes each, that the shards of a run exchange for an update."""

Durability = Literal["none", "checkpoint", "journal"]
"""What survives a crash of the service."""
_Name = Annotated[str, Field(min_length=1, max_length=512)]

GroupOverrides = dict[str, Any]
"""The hyperparameters of one param group that differ from the run's."""


class ParameterSpec(StrictModel):
    """One tensor of a run."""

    name: _Name
    """The tensor's name, unique in the run; `__metadata__` is reserved by the safetensors format."""
    shape: tuple[Annotated[int, Field(strict=True, ge=0, le=2**48)], ...] = Field(max_length=64)
    """The tensor's shape; [] is a scalar, and a dimension of 0 makes it empty."""
    group: _Name = DEFAULT_GROUP
    """The name of its param group: `default`, or one of the run's `groups`."""

    @model_validator(mode="after")
    def _not_reserved(self) -> ParameterSpec:
        if self.name == "__metadata__":
            raise fault(("name",), "the safetensors format reserves the name __metadata__")
        return self


_EXAMPLE: dict[str, Any] = {
    "optimizer": {"algorithm": "adamw_schedule_free", "lr": 2.5e-3},
    "parameters": [{"name": "weight", "shape": [10, 784]}, {"name": "bias", "shape": [10]}],
}


class RunSpec(StrictModel):
    """What a run is: fixed when it is created, except for the number of shards.

    Example:
        >>> freestep.RunSpec.model_validate({
        ...     "optimizer": {"algorithm": "adamw_schedule_free", "lr": 2.5e-3},
        ...     "parameters": [{"name": "weight", "shape": [10, 784]}, {"name": "bias", "shape": [10]}],
        ... })

    Raises:
        ValidationError: A field is out of range, or names do not match.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    optimizer: OptimizerSpec
    """The algorithm and its hyperparameters: a class of `freestep.api.hyperparameters`, or its document with
    `algorithm`."""
    aggregation: AggregationSpec = AggregationSpec()
    """How pushes become updates; `ringmaster` by default."""
    parameters: tuple[ParameterSpec, ...] = Field(min_length=1, max_length=MOST_PARAMETERS, fail_fast=True)
    """The tensors, in the order in which the flat vector contains them; of faulty ones the first is named."""
    groups: dict[_Name, GroupOverrides] = Field(default_factory=dict, max_length=MOST_GROUPS)
    """Param groups by name, with the hyperparameters that differ from the run's."""
    lease_ttl_ms: Annotated[int, Field(strict=True, ge=100, le=3_600_000)] = 30_000
    """Milliseconds after which a lease ends that is not renewed."""
    durability: Durability = "checkpoint"
    """What survives a crash: nothing, the last checkpoint, or every push that was acknowledged."""
    shards: Annotated[int, Field(strict=True, ge=1, le=MOST_SHARDS)] = 1
    """How many shards the run is created with."""

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        names: set[str] = set()
        for index, parameter in enumerate(self.parameters):
            if parameter.name in names:
                raise fault(("parameters", index, "name"), f"the name {parameter.name!r} is used twice")
            names.add(parameter.name)
            if parameter.group not in self.groups and parameter.group != DEFAULT_GROUP:
                raise fault(("parameters", index, "group"), f"there is no group {parameter.group!r}")
        whole = self.whole_groups()
        for index, parameter in enumerate(self.parameters):
            if parameter.group in whole and len(parameter.shape) != 2:
                raise fault(
                    ("parameters", index, "shape"),
                    f"parameter {parameter.name!r} has shape {list(parameter.shape)}, but base "
                    f"{self._base(parameter.group)!r} needs 2-D parameters: put it in a group with base 'adamw'",
                )
        if self.optimizer.needs_loss and self.shards > 1:
            raise fault(
                ("shards",),
                f"{self.optimizer.algorithm!r} needs sums over all parameters for its step size: it runs on one shard",
            )
        if self.optimizer.needs_loss and self.aggregation.robust != "none":
            raise fault(
                ("aggregation", "robust"),
                f"{self.optimizer.algorithm!r} makes its step size of losses that workers give, which no rule bounds",
            )
        if self.shards > self.most_shards:
            raise fault(("shards",), f"at most {self.most_shards}, for as many pushes as 'krum' compares here")
        return self

    @property
    def most_shards(self) -> int:
        """The largest number of shards under the run's aggregation."""
        pushes = self.aggregation.most_pushes
        if self.aggregation.robust != "krum" or pushes is None:
            return MOST_SHARDS
        return min(MOST_SHARDS, _MOST_DISTANCES // (pushes * (pushes - 1) // 2))

    def _base(self, group: str) -> str:
        hyperparameters = self.hyperparameters(group)
        assert isinstance(hyperparameters, ScheduleFreeWrapper)
        return hyperparameters.base.algorithm

    def group_names(self) -> tuple[str, ...]:
        """The names of the param groups that have parameters, in the order of their first parameters."""
        return tuple(dict.fromkeys(parameter.group for parameter in self.parameters))

    def whole_groups(self) -> set[str]:
        """The names of the param groups whose tensors are not divided between shards."""
        return {group for group in (DEFAULT_GROUP, *self.groups) if self.hyperparameters(group).takes_matrices}

    def hyperparameters(self, group: str) -> OptimizerSpec:
        """The hyperparameters of a param group: the run's, with the group's own in their place.

        Args:
            group: The group's name; one without hyperparameters of its own has the run's.
        """
        try:
            return self.optimizer.overruled(self.groups.get(group, {}))
        except ValidationError as error:
            place, why = first_fault(error)
            raise fault(("groups", group, *place), why) from None
