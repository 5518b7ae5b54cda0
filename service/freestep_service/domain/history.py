"""The curves of a run, and what has happened to it, made of its events.

The law of this file: an event costs a few numbers, and what is kept is bounded, whatever happens. An entry of the log
counts once: one that a journal's replay tells of again is known by its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freestep.api.history import CURVES
from freestep_service.domain.curves import Curve, Moment
from freestep_service.domain.events import Event
from freestep_service.domain.milestones import Milestones
from freestep_service.domain.reports import MOST_METRICS
from freestep_service.domain.tally import DECISIONS

__all__ = ["HistoryCurves"]

_MOST_EPOCHS = 256
_SPEED_S = 1.0
"""Seconds over which the speed is measured, at least."""


class HistoryCurves:
    """The curves of one run, and where its epochs began."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {name: Curve() for name in CURVES}
        self.metrics: dict[str, Curve] = {}
        self.epochs: list[Moment] = []
        """The newest, by their beginnings."""
        self.milestones = Milestones()
        self._place = (0, 0)
        """The epoch and seq of the newest entry that has counted."""
        self._now = Moment(0, 0, 0.0)
        self._since: Moment | None = None
        """Since when the speed is measured."""
        self._live: int | None = None

    @property
    def epoch(self) -> int:
        """The run's, as of the newest event."""
        return self._now.epoch

    @property
    def step(self) -> int:
        """The run's, as of the newest event."""
        return self._now.step

    def take(self, event: Event, time: float, *, is_replayed: bool = False) -> None:
        """Counts an event. is_replayed: the time is not that of when it happened, and tells of no speed."""
        if event.place.number == 0:
            if event.place[:2] <= self._place:
                return
            self._place = event.place[:2]
        self._now = now = Moment(event.step, event.place.epoch, time)
        self.milestones.add(event, time)
        if event.kind == "push":
            self._push(event.members, now)
        elif event.kind == "metric":
            self._metric(event.members, now)
        elif event.kind == "epoch":
            self._begin(now)
        if is_replayed:
            self._since = None
        elif event.kind in ("push", "update"):
            self._measure_speed(now)

    def live(self, workers: int, time: float) -> bool:
        """Notes how many workers hold leases; whether that is news."""
        is_new = workers != self._live
        if is_new:
            self._live = workers
            self.curves["workers"].add(self._now._replace(time=time), workers)
        return is_new

    def _push(self, push: Mapping[str, Any], now: Moment) -> None:
        for decision in DECISIONS:
            self.curves[decision].add(now, push["decision"] == decision)
        if push["decision"] == "dropped":
            return
        for name in ("loss", "staleness", "samples"):
            if push[name] is not None:
                self.curves[name].add(now, push[name])

    def _metric(self, measured: Mapping[str, Any], now: Moment) -> None:
        name = measured["name"]
        if name not in self.metrics and len(self.metrics) >= MOST_METRICS:
            # The run went back to before it was reported.
            del self.metrics[min(self.metrics, key=lambda each: self.metrics[each].newest)]
        at = now._replace(step=measured["measured_at"])
        self.metrics.setdefault(name, Curve()).add(at, measured["value"])

    def _begin(self, now: Moment) -> None:
        self._since = now
        if not self.epochs or now.epoch > self.epochs[-1].epoch:
            self.epochs.append(now)
            del self.epochs[:-_MOST_EPOCHS]

    def _measure_speed(self, now: Moment) -> None:
        since = self._since
        if since is None or now.time < since.time:
            # Nothing is known of before, or the clock has gone back.
            self._since = now
        elif now.step > since.step and now.time - since.time >= _SPEED_S:
            self.curves["steps_per_second"].add(now, (now.step - since.step) / (now.time - since.time))
            if self._live is not None:
                self.curves["workers"].add(now, self._live)
            self._since = now

    def to_document(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "place": self._place,
            "now": self._now,
            "epochs": self.epochs,
            "curves": {name: curve.to_document() for name, curve in self.curves.items()},
            "metrics": {name: curve.to_document() for name, curve in self.metrics.items()},
            "milestones": self.milestones.to_document(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> HistoryCurves:
        """Of what `to_document` has made. Raises ValueError for anything else."""
        made = cls()
        try:
            epoch, seq = map(int, document["place"])
            made._place = epoch, seq
            made._now = _moment(document["now"])
            made.epochs = [_moment(each) for each in document["epochs"]][-_MOST_EPOCHS:]
            read = {name: Curve.from_document(each) for name, each in document["curves"].items()}
            # A version that has other curves may have written it.
            made.curves |= {name: curve for name, curve in read.items() if name in made.curves}
            made.metrics = {name: Curve.from_document(each) for name, each in document["metrics"].items()}
            # A version that had none may have written it.
            made.milestones = Milestones.from_document(document.get("milestones", {}))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is no history ({type(error).__name__})") from error
        return made


def _moment(document: Any) -> Moment:
    step, epoch, time = document
    return Moment(int(step), int(epoch), float(time))
