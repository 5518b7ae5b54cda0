"""A run's events as points of its curves.

The law of this file: a point is of the run and not of a worker. It has what all pushes told that were decided since the
point before, and comes with the update that they led to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from freestep.api.events import CheckpointEvent, ControlEvent, EpochEvent, MetricEvent, PushEvent, RunEvent, UpdateEvent

__all__ = ["Curves", "Point"]


class Point(NamedTuple):
    """What curves have at a step."""

    step: int
    metrics: Mapping[str, float]


@dataclass
class _Gathered:
    """What was told since the last point. made_at: the step of that point."""

    made_at: int = 0
    pushes: int = 0
    dropped: int = 0
    samples: float = 0.0
    loss: float = 0.0
    losses: int = 0
    staleness: float = 0.0
    stale: int = 0

    def add(self, push: PushEvent) -> None:
        self.pushes += push.coalesced
        if push.decision == "dropped":
            self.dropped += 1
            return
        self.staleness += push.staleness
        self.stale += 1
        self.samples += push.samples or 0.0
        if push.loss is not None:
            self.loss += push.loss
            self.losses += 1

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {"run/pushes": self.pushes, "run/dropped": self.dropped}
        if self.stale:
            found["run/staleness"] = self.staleness / self.stale
        if self.losses:
            found["train/loss"] = self.loss / self.losses
        if self.samples:
            found["train/samples"] = self.samples
        return found


class Curves:
    """Makes points of events.

    Args:
        every: Steps for which there is one point: the first step that is a multiple of it, or lies behind one.
        gathered: What `gathered` was, to go on from there.
    """

    def __init__(self, every: int = 1, gathered: Mapping[str, float] | None = None) -> None:
        self._every = every
        try:
            self._gathered = _Gathered(**(gathered or {}))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"no state of curves: {gathered}") from error

    @property
    def gathered(self) -> dict[str, float]:
        """What was told since the last point, and where that was, as JSON has it."""
        return asdict(self._gathered)

    def points(self, event: RunEvent) -> Iterator[Point]:
        """The points that an event leads to: of what pushes told, a metric, an epoch, a checkpoint or a change."""
        match event:
            case PushEvent():
                self._gathered.add(event)
                if event.decision == "applied":
                    yield from self._made(event.step)
            case UpdateEvent():
                yield from self._made(event.step)
            case MetricEvent():
                yield Point(event.measured_at, {f"eval/{event.name}": event.value})
            case EpochEvent():
                # Pushes that were gathered for an update count no more.
                self._gathered = _Gathered(event.step)
                yield Point(event.step, {"run/epoch": event.epoch})
            case CheckpointEvent():
                yield Point(event.step, {"run/checkpoint_step": event.written_step})
            case ControlEvent() if "worker" not in event.changes:
                if changed := dict(_numbers("control", event.changes)):
                    yield Point(event.step, changed)

    def _made(self, step: int) -> Iterator[Point]:
        made_at = self._gathered.made_at
        if step // self._every > made_at // self._every or step < made_at:
            metrics = self._gathered.metrics()
            self._gathered = _Gathered(step)
            yield Point(step, metrics)


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    """The numbers in a document, by the names that lead to them."""
    if isinstance(value, bool | int | float):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _numbers(f"{name}/{key}", member)
