"""The curves of a run over its whole life, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict

from freestep.api.events import RunEvent, event_of

__all__ = ["CURVES", "MOST_POINTS", "Curve", "CurveName", "CurvePoint", "EpochBegun", "History", "Milestone"]

MOST_POINTS = 512
"""Points of a curve."""

CurveName: TypeAlias = Literal[
    "loss",
    "staleness",
    "samples",
    "applied",
    "accumulated",
    "dropped",
    "steps_per_second",
    "workers",
]
"""loss, staleness and samples are those of each push that was not dropped, as far as it gave them; applied, accumulated
and dropped are 1 for each push so decided and 0 for each other, so that means are shares, and mean times count is a
number of pushes; steps_per_second is measured once a second at most, when an update is made, so a pause is one
observation; workers are the live leases, when their number changes and with each speed."""
CURVES: tuple[CurveName, ...] = get_args(CurveName)
"""The names of the curves that every run has."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of a curve: observations that followed each other.

    Args:
        step: The run's step at the last of them; of a metric, the step of the x that was measured.
        epoch: The run's epoch then.
        time: Seconds since 1970.
        count: How many they are.
        mean: Their mean.
        min: The least.
        max: The largest.
    """

    step: int
    epoch: int
    time: float
    count: int
    mean: float
    min: float
    max: float


class Curve(_Answer):
    """A curve in columns: the first point is made of the first number of each. Points are in the order of time."""

    per_point: int
    """How many observations a point stands for, the newest of an epoch perhaps for fewer; a power of two."""
    step: list[int]
    """The run's step at each point's last observation; of a metric, the step of the x that was measured."""
    epoch: list[int]
    """The run's epoch then."""
    time: list[float]
    """Seconds since 1970."""
    count: list[int]
    """How many observations each point stands for."""
    mean: list[float]
    """Their mean."""
    min: list[float]
    """The least of them."""
    max: list[float]
    """The largest."""

    def points(self) -> list[CurvePoint]:
        """The points, oldest first."""
        columns = self.step, self.epoch, self.time, self.count, self.mean, self.min, self.max
        return [CurvePoint(*point) for point in zip(*columns, strict=True)]


class EpochBegun(_Answer):
    """Where the run went on in a new epoch: points of later steps in earlier epochs are of weights that it gave up."""

    epoch: int
    """The new epoch."""
    step: int
    """The step that it began with."""
    time: float
    """Seconds since 1970."""


class Milestone(_Answer):
    """An event that no curve tells of: of leases, changes, checkpoints, shards and data sets."""

    time: float
    """When it happened, or was replayed from a journal; seconds since 1970."""
    event: Annotated[RunEvent, BeforeValidator(event_of)]
    """The event, as `events` tells of it."""


class History(_Answer):
    """The curves of a run from its creation on, over restarts and new owners."""

    run: str
    """The run's name."""
    epoch: int
    """Its epoch."""
    step: int
    """Its step."""
    curves: dict[str, Curve]
    """Those that were asked for, of the names that every run has."""
    metrics: dict[str, Curve]
    """Reported metrics by name; of more than 64 those that were reported last."""
    epochs: list[EpochBegun]
    """Where its epochs began, the newest 256."""
    milestones: list[Milestone] = []
    """What else has happened, in the order of time: of each kind of event the newest 256, or fewer if they are long."""
