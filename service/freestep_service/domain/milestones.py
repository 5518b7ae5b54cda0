"""What has happened to a run beside its pushes, over its whole life: the newest of each kind, in bounded memory.

The law of this file: no kind takes the place of another. Checkpoints that come every few seconds push out older
checkpoints, and not the day on which a worker joined.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from freestep_service.domain.events import Event

__all__ = ["KINDS", "Milestone", "Milestones"]

KINDS = ("lease", "control", "checkpoint", "shards", "data")
"""The kinds of events that are kept. Epochs have a list of their own, and pushes and metrics have curves."""
_MOST = 256
"""Of each kind."""
_LONGEST = 64 * 1024
"""Characters of all of a kind, where that is more than one."""


class Milestone(NamedTuple):
    """An event (JSON), and when it happened, in seconds since 1970."""

    time: float
    event: str


class Milestones:
    """The milestones of one run."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Milestone]] = {kind: deque() for kind in KINDS}
        self._lengths = dict.fromkeys(KINDS, 0)

    def add(self, event: Event, time: float) -> None:
        """Keeps an event, if it is of a kind that is kept."""
        if event.kind in self._kept:
            self._append(event.kind, Milestone(time, event.to_json()))

    def all(self) -> list[Milestone]:
        """Those that are kept, in the order of their times."""
        return sorted(milestone for kept in self._kept.values() for milestone in kept)

    def to_document(self) -> dict[str, list[Milestone]]:
        """All of them as JSON."""
        return {kind: list(kept) for kind, kept in self._kept.items()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Milestones:
        """Of what `to_document` has made. Raises ValueError, KeyError and TypeError for anything else."""
        made = cls()
        for kind in KINDS:
            for time, event in document.get(kind, ()):
                if not isfinite(time) or json.loads(event)["kind"] != kind:
                    raise ValueError("a milestone is none of its kind")
                made._append(kind, Milestone(float(time), event))
        return made

    def _append(self, kind: str, milestone: Milestone) -> None:
        kept = self._kept[kind]
        kept.append(milestone)
        self._lengths[kind] += len(milestone.event)
        while len(kept) > _MOST or (self._lengths[kind] > _LONGEST and len(kept) > 1):
            self._lengths[kind] -= len(kept.popleft().event)
