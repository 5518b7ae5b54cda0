"""What happens to a run, as a service tells of it: one model for each kind of event."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "TOLD",
    "CheckpointEvent",
    "ControlEvent",
    "DataEvent",
    "EpochEvent",
    "GapEvent",
    "LeaseEvent",
    "MetricEvent",
    "OtherEvent",
    "PushEvent",
    "RunEvent",
    "ShardsEvent",
    "ToldEvent",
    "UpdateEvent",
    "event_of",
]


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    id: str
    """Its place: EPOCH-SEQ for an entry of the log, EPOCH-SEQ.NUMBER for what has none; rises from event to event."""
    epoch: int
    """The run's."""
    step: int
    """The run's, once it has happened."""


class PushEvent(_Event):
    """A push was decided, and is being applied."""

    kind: Literal["push"]
    worker: str
    """Whose push it is."""
    decision: Literal["applied", "accumulated", "dropped"]
    """As in its receipt."""
    reason: str | None
    """Why it was dropped, or that its norm is an outlier's."""
    staleness: int
    """Steps that its gradient was behind."""
    loss: float | None
    """The training loss that it gave; null where it gave none, or what it gave is not known here."""
    samples: float | None
    """The samples behind its gradient, likewise."""
    units: dict[str, list[int]]
    """The units of data sets that have counted with it."""
    coalesced: int = 1
    """How many pushes this one stands for, itself the last of them: more than 1 for readers that are behind."""


class UpdateEvent(_Event):
    """An update was made without a push: a lease has ended that it waited for."""

    kind: Literal["update"]


class MetricEvent(_Event):
    """A metric was reported."""

    kind: Literal["metric"]
    name: str
    """The metric's name."""
    value: float
    """Its value."""
    measured_at: int
    """The step of the x that was measured."""


class DataEvent(_Event):
    """A data set was added."""

    kind: Literal["data"]
    name: str
    """Its name."""


class LeaseEvent(_Event):
    """A lease was granted, released, ended by an operator, or has expired; renewals are not told."""

    kind: Literal["lease"]
    change: Literal["granted", "released", "ended", "expired"]
    """What has happened."""
    worker: str
    """Whose lease it is."""


class ControlEvent(_Event):
    """The run was changed, paused or resumed, or a worker suspended."""

    kind: Literal["control"]
    by: str
    """The name of the token that asked for it."""
    changes: dict[str, Any]
    """What was asked for: `optimizer`, `groups`, `aggregation` and `paused`, or `worker` and `ban` in seconds."""


class EpochEvent(_Event):
    """The run goes on in an epoch at a step: a new one, or the same in another process.

    What was told of later steps in earlier epochs counts no more.
    """

    kind: Literal["epoch"]


class CheckpointEvent(_Event):
    """A checkpoint is complete."""

    kind: Literal["checkpoint"]
    written_epoch: int
    """The epoch of the state in it."""
    written_step: int
    """The step of that state."""


class ShardsEvent(_Event):
    """The shards have other owners, or there is another number of them."""

    kind: Literal["shards"]
    shards: int
    """How many there are."""
    owners: list[str | None]
    """Their owners' URLs, by shard; null where one has none."""


class GapEvent(_Event):
    """What is between two places is not known any more; the stream goes on behind this event's own."""

    kind: Literal["gap"]
    after: str | None
    """Up to where the reader has been told; null where it asked for a step."""
    entries: int | None
    """Entries of the log that are missing: with 0, only what has none may be; null where it is not known."""


ToldEvent: TypeAlias = (
    PushEvent
    | UpdateEvent
    | MetricEvent
    | DataEvent
    | LeaseEvent
    | ControlEvent
    | EpochEvent
    | CheckpointEvent
    | ShardsEvent
    | GapEvent
)
"""An event of a kind that is known here."""


class OtherEvent(_Event):
    """An event of a kind that only a newer service knows, with its members as they came."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    kind: str
    """Its kind."""


RunEvent: TypeAlias = ToldEvent | OtherEvent
"""What happened to a run, by its `kind`."""

_KINDS = {
    "push", "update", "metric", "data", "lease", "control", "epoch", "checkpoint", "shards", "gap",
}  # fmt: skip
TOLD: TypeAdapter[ToldEvent] = TypeAdapter(Annotated[ToldEvent, Field(discriminator="kind")])
"""Reads events, and has their schema."""


def event_of(document: dict[str, Any]) -> RunEvent:
    """An event from its JSON document.

    Args:
        document: As a service has sent it.

    Raises:
        ValueError: It is no event.
    """
    if document.get("kind") in _KINDS:
        return TOLD.validate_python(document)
    return OtherEvent.model_validate(document)
