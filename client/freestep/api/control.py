"""What can be changed of a run while it trains, and its spec with what was changed.

A run's spec stays as it was created. What was changed is kept beside it, as the fields that differ: the spec in force
is a function of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from freestep.api.aggregation import AggregationSpec
from freestep.api.hyperparameters import OptimizerSpec
from freestep.api.spec import DEFAULT_GROUP, RunSpec
from freestep.api.validation import Flag, StrictModel, fault, first_fault

__all__ = ["LONGEST_BAN_S", "ControlRequest", "RunControl", "changed", "in_force"]

LONGEST_BAN_S = 366 * 24 * 3600
"""The longest time for which a worker is refused leases, in seconds."""

_KINDS = ("name", "algorithm")
"""The members that tell what kind of document one is."""
_OF_POLICY = ("batch", "max_staleness", "slack", "max_batch")
"""The fields of an aggregation that a policy has values of its own for."""
_OF_COMPARING = ("policy", "batch", "max_batch", "robust", "beta", "f", "m")
"""What memory was taken for, under a rule that compares the pushes of an update."""


class ControlRequest(StrictModel):
    """What is to be changed of a run; what it does not name stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"optimizer": {"lr": 1e-3}}]})

    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Hyperparameters and their new values. Of documents such as `schedule` or `base` the members that are named
    change, or the whole, where it names another kind."""
    groups: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Hyperparameters by param group, likewise; each becomes the group's own."""
    aggregation: dict[str, Any] = Field(default_factory=dict)
    """Fields of the aggregation and their new values. Another `policy` begins with its own values, where the request
    names none."""
    paused: Flag | None = None
    """Whether pushes are refused until the run is resumed; null leaves that as it is."""

    @model_validator(mode="before")
    @classmethod
    def _names_what_can_change(cls, document: Any) -> Any:
        for name in document if isinstance(document, Mapping) else ():
            if name in RunSpec.model_fields and name not in cls.model_fields:
                raise fault((name,), _why_fixed(name))
        return document

    @model_validator(mode="after")
    def _can_be_told(self) -> Self:
        # The run's log, its events and its history say what was asked for.
        try:
            self.model_dump_json()
        except ValueError:
            raise ValueError("it has half of a surrogate pair, or is nested too deeply") from None
        return self


class RunControl(BaseModel):
    """What has been changed of a run since it was created, as far as it differs now."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    optimizer: dict[str, Any] = {}
    """Hyperparameters that differ from the spec's, with the values in force."""
    groups: dict[str, dict[str, Any]] = {}
    """Param groups whose own hyperparameters differ from the spec's, with all of their own that are in force."""
    aggregation: dict[str, Any] = {}
    """Fields of the aggregation that differ from the spec's, with the values in force."""
    paused: bool = False
    """Whether pushes are refused until the run is resumed."""
    suspended: Annotated[dict[str, int], Field(description="Worker -> milliseconds for which it gets no lease.")] = {}


def in_force(spec: RunSpec, control: RunControl) -> RunSpec:
    """A run's spec with what has been changed of it. Raises ValidationError for changes that are not of this spec."""
    if not (control.optimizer or control.groups or control.aggregation):
        return spec
    return spec.model_copy(
        update={
            "optimizer": _with(spec.optimizer, control.optimizer),
            "groups": {**spec.groups, **control.groups},
            "aggregation": _with(spec.aggregation, control.aggregation),
        }
    )


def changed(spec: RunSpec, control: RunControl, wish: ControlRequest) -> RunControl:
    """What is changed of a run after a request.

    spec: as the run was created. control: what has been changed so far.
    Raises ValidationError where a field is unknown, out of range or cannot be changed, and says why.
    """
    now = in_force(spec, control)
    if wish.optimizer.get("algorithm", now.optimizer.algorithm) != now.optimizer.algorithm:
        raise fault(("optimizer", "algorithm"), "belongs to the run, with the state that it keeps: create another run")
    then = now.model_copy(
        update={
            "optimizer": _at(("optimizer",), now.optimizer, wish.optimizer),
            "groups": _groups(now, wish.groups),
            "aggregation": _at(("aggregation",), now.aggregation, _of_new_policy(now.aggregation, wish.aggregation)),
        }
    )
    _require_changeable(now, then)
    return RunControl(
        optimizer=_differing(spec.optimizer, then.optimizer),
        groups={name: own for name, own in then.groups.items() if own != spec.groups.get(name, {})},
        aggregation=_differing(spec.aggregation, then.aggregation),
        paused=control.paused if wish.paused is None else wish.paused,
        suspended=control.suspended,
    )


def _with(model: Any, fields: Mapping[str, Any]) -> Any:
    return type(model).model_validate({**model.model_dump(mode="json"), **fields}) if fields else model


def _at(place: tuple[str, ...], model: Any, asked: Mapping[str, Any]) -> Any:
    """A model with fields changed; its faults are named from the request's beginning."""
    _require_known(place, model, asked)
    try:
        return _with(model, _merged(model.model_dump(mode="json"), asked)) if asked else model
    except ValidationError as error:
        field, why = first_fault(error)
        raise fault((*place, *field), why) from None


def _require_known(place: tuple[str, ...], model: Any, asked: Mapping[str, Any]) -> None:
    """Raises ValidationError for a name that a model has no field of, and for what is no list where it has one."""
    for name, value in asked.items():
        if name not in type(model).model_fields:
            raise fault((*place, name), _why_unknown(model, name))
        now = getattr(model, name)
        if isinstance(now, tuple) and not (isinstance(value, list | tuple) and len(value) == len(now)):
            raise fault((*place, name), f"must be a list of {len(now)} numbers, as {list(now)}")


def _why_fixed(name: str) -> str:
    """Why a member of a run's spec is no part of a change."""
    if name == "shards":
        return "the number of shards has a call of its own: freestep runs reshard"
    return f"{name} is fixed when a run is created"


def _why_unknown(model: Any, name: str) -> str:
    if name in RunSpec.model_fields:
        return _why_fixed(name)
    own = type(model).__annotations__
    # The algorithm's own first, then those that others have too.
    fields = sorted(type(model).model_fields, key=lambda field: field not in own)
    fields = [field for field in fields if field != "algorithm"]
    if isinstance(model, AggregationSpec):
        return f"there is no field {name!r} to set; an aggregation has {', '.join(fields)}"
    return f"there is no hyperparameter {name!r} to set; {model.algorithm} has {', '.join(fields)}"


def _merged(document: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A document with fields changed; of documents in it of the same kind, their members."""
    made = dict(document)
    for name, value in asked.items():
        old = made.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            is_same_kind = all(value.get(kind, old.get(kind)) == old.get(kind) for kind in _KINDS)
            value = {**old, **value} if is_same_kind else value
        made[name] = value
    return made


def _groups(now: RunSpec, asked: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    groups = dict(now.groups)
    for name, own in asked.items():
        if name not in groups and name != DEFAULT_GROUP:
            names = ", ".join(dict.fromkeys([DEFAULT_GROUP, *groups]))
            raise fault(("groups", name), f"there is no such param group: the run has {names}")
        _require_known(("groups", name), now.optimizer, own)
        groups[name] = _merged({**_inherited(now, name, own), **groups.get(name, {})}, own)
    return groups


def _inherited(now: RunSpec, group: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The documents that are asked for in part, as a param group has them of the run.

    A `base` is not among them: a group names what differs of it, and the rest goes on being the run's.
    """
    here = now.hyperparameters(group).model_dump(mode="json", exclude={"base"})
    return {name: here[name] for name in asked if isinstance(here.get(name), Mapping)}


def _of_new_policy(now: AggregationSpec, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    if asked.get("policy", now.policy) == now.policy:
        return asked
    return {**dict.fromkeys(_OF_POLICY), **asked}


def _require_changeable(now: RunSpec, then: RunSpec) -> None:
    """Raises ValidationError where what differs cannot be changed."""
    _require_fixed(("optimizer",), now.optimizer, then.optimizer)
    for group in (DEFAULT_GROUP, *then.groups):
        _require_fixed(("groups", group), now.hyperparameters(group), then.hyperparameters(group))
    before, after = now.aggregation, then.aggregation
    if before.compares or after.compares:
        for name in _OF_COMPARING:
            if getattr(before, name) != getattr(after, name):
                rule = before.robust if before.compares else after.robust
                raise fault(
                    ("aggregation", name),
                    f"{rule!r} compares the pushes of an update, and memory for them is taken when a run is created: "
                    "create another run",
                )
    if then.optimizer.needs_loss and after.robust != "none":
        raise fault(
            ("aggregation", "robust"),
            f"{then.optimizer.algorithm!r} makes its step size of losses that workers give, which no rule bounds",
        )


def _require_fixed(place: tuple[str, ...], now: OptimizerSpec, then: OptimizerSpec) -> None:
    kept = then.fixed()
    for name, (value, why) in now.fixed().items():
        if kept[name][0] != value:
            raise fault((*place, name), why)


def _differing(sealed: BaseModel, model: BaseModel) -> dict[str, Any]:
    """The fields of a model that differ from those that a run was created with."""
    before = sealed.model_dump(mode="json")
    return {name: value for name, value in model.model_dump(mode="json").items() if value != before[name]}
