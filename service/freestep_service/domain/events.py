"""What happens to a run, as events with places, and how many of them become few.

An event's place is that of its entry in the log. What has no entry (dropped pushes, leases, checkpoints) comes behind
the entry before it, and is numbered. Places only rise: with the run's epoch, within an epoch with the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

__all__ = ["PLACE_PATTERN", "Event", "Place", "coalesced"]

_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
PLACE_PATTERN = rf"{_NUMBER}-{_NUMBER}(?:\.{_NUMBER})?"
"""What the text of a place matches: EPOCH-SEQ, or EPOCH-SEQ.NUMBER of what has no entry in the log."""
_PLACE = re.compile(rf"({_NUMBER})-({_NUMBER})(?:\.({_NUMBER}))?")


class Place(NamedTuple):
    """The place of an event: entry `seq` of an epoch's log, or, where `number` is not 0, behind it."""

    epoch: int
    seq: int
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises ValueError for a text that is no place."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise ValueError
        return cls(*(int(part or 0) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}" + (f".{self.number}" if self.number else "")


@dataclass(eq=False, slots=True)
class Event:
    """One event, of a kind that `api/events.py` has a model of. step: the run's, once it has happened."""

    kind: str
    place: Place
    step: int
    members: Mapping[str, Any] = field(default_factory=dict)
    """What the model has beside what all have."""
    sent: bytes | None = None
    """The event as it is sent, kept by whoever sends it first."""

    def to_json(self) -> str:
        """The event as JSON, as its model has it."""
        common = {"kind": self.kind, "id": str(self.place), "epoch": self.place.epoch, "step": self.step}
        return json.dumps(common | dict(self.members))


def coalesced(events: Sequence[Event]) -> list[Event]:
    """Events with pushes that follow each other made one: the last of them, `coalesced` with the number of them all.

    So an event's place is still that up to which everything has been told.
    """
    made: list[Event] = []
    for is_push, group in groupby(events, lambda event: event.kind == "push"):
        found = list(group)
        made += [_standing_for(found[-1], len(found))] if is_push and len(found) > 1 else found
    return made


def _standing_for(event: Event, pushes: int) -> Event:
    return Event(event.kind, event.place, event.step, {**event.members, "coalesced": pushes})
