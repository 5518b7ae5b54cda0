"""The newest events of a run, kept by the process that owns its first shard, and those who read them.

The law of this file: an event costs the same however many read. It is put into one list; readers hold a place in it,
and come for what is new when they have sent what they had. One who comes too late is told what he has missed.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from freestep.errors import MalformedRequest, Overloaded
from freestep_service.domain.events import Event, Place, coalesced
from freestep_service.domain.records import CheckpointId, Claim, Record
from freestep_service.state.log import Entry

__all__ = ["EventReader", "RunEvents"]

_KEPT = 4096
"""Events that are kept at least."""
_KEPT_UNITS = 65_536
"""Units that pushes name, in all the events that are kept."""
_SPARE = 1024
"""Events beyond those: so many are forgotten at a time."""
_MOST_READERS = 100
"""Of one run: each has a connection. Where all places are taken, one of whoever has most of them is for others."""
_IN_FRAME = 256
"""Events that a reader takes at a time."""


class RunEvents:
    """The events of one run from the moment that this process owns its first shard.

    now_ms: a clock. What has no entry in the log is numbered by it, so that numbers rise over processes too. hears: is
    told of every event, at once. first_epoch: of the run; what was told of earlier ones is of another run of its name.
    """

    def __init__(
        self,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        kept: int = _KEPT,
        hears: Callable[[Event], None] = lambda _: None,
        first_epoch: int = 0,
    ) -> None:
        self._now_ms = now_ms
        self._hears = hears
        self._first_epoch = first_epoch
        self._kept = kept
        self._spare = min(_SPARE, kept)
        self._events: list[Event] = []
        self._start = self._place = Place(0, 0)
        """Behind the first, all events are kept; the second is the newest that is known."""
        self._step = 0
        self._units = 0
        self._is_open = False
        self._checkpoint: CheckpointId | None = None
        self._shards: object = None
        self._readers: dict[str, list[EventReader]] = {}
        """By who reads, oldest first."""
        self._waiting: set[asyncio.Future[None]] = set()

    # What happens

    def begin(self, epoch: int, seq: int, step: int) -> None:
        """The first shard goes on after entry `seq` of an epoch."""
        if self._is_open and (epoch, seq) == self._place[:2]:
            return
        if not self._is_open or epoch == self._place.epoch:
            # What came between is not known here.
            self._forget_all(Place(epoch, seq, self._now_ms()))
        self._is_open = True
        self._step = step
        self._place = max(self._place, Place(epoch, seq))
        self._add("epoch")

    def end(self) -> None:
        """The first shard is this process's no more: what happens from here on is not known."""
        self._is_open = False
        self._checkpoint = self._shards = None
        self._wake()

    def took(self, entry: Entry) -> None:
        """The first shard has taken an entry of the log."""
        if not self._is_open:
            return
        self._place = Place(entry.epoch, entry.seq)
        self._step += entry.advance
        if entry.record is not None:
            self._put(Event("push", self._place, self._step, _of_push(entry.record, entry.claim)))
            self._units += sum(map(len, entry.units.values()))
        elif entry.measured is not None:
            name, at, value = entry.measured
            self._put(Event("metric", self._place, self._step, {"name": name, "value": value, "measured_at": at}))
        elif entry.control is not None:
            changes = json.loads(entry.control.asked)
            self._put(Event("control", self._place, self._step, {"by": entry.control.by, "changes": changes}))
        elif entry.data is not None:
            self._put(Event("data", self._place, self._step, {"name": entry.data.name}))
        elif entry.advance:
            self._put(Event("update", self._place, self._step))

    def dropped(self, record: Record, claim: Claim | None = None) -> None:
        """A push was dropped without a place in the log. claim: None where only its record is known."""
        self._add("push", _of_push(record, claim))

    def lease(self, change: str, worker: str) -> None:
        """A lease was granted, released, ended by an operator, or has expired."""
        self._add("lease", {"change": change, "worker": worker})

    def checkpoint(self, written: CheckpointId) -> None:
        """A checkpoint is complete; it may be told again."""
        if self._checkpoint is None or written > self._checkpoint:
            self._checkpoint = written
            self._add("checkpoint", {"written_epoch": written.epoch, "written_step": written.step})

    def shards(self, owners: Mapping[int, str | None]) -> None:
        """Who owns which shard; it may be told again."""
        if self._is_open and owners != self._shards:
            self._shards = dict(owners)
            self._add("shards", {"shards": len(owners), "owners": [owners[index] for index in sorted(owners)]})

    def _add(self, kind: str, members: Mapping[str, Any] | None = None) -> None:
        """Adds what has no entry in the log."""
        if self._is_open:
            number = max(self._now_ms(), self._place.number + 1)
            self._place = self._place._replace(number=number)
            self._put(Event(kind, self._place, self._step, members or {}))

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._hears(event)
        if len(self._events) >= self._kept + self._spare:
            self._forget(len(self._events) - self._kept)
        elif self._units > _KEPT_UNITS:
            self._forget(len(self._events) - len(self._events) // 2)
        if self._waiting:
            self._wake()

    def _forget(self, count: int) -> None:
        self._start = self._events[count - 1].place
        del self._events[:count]
        named = (event.members.get("units") or {} for event in self._events)
        self._units = sum(len(numbers) for units in named for numbers in units.values())

    def _forget_all(self, start: Place) -> None:
        self._events.clear()
        self._units = 0
        self._start = self._place = start

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    # Who reads

    @property
    def is_open(self) -> bool:
        """Whether events are told here."""
        return self._is_open

    @property
    def start(self) -> Place:
        """Behind it all events are kept."""
        return self._start

    @property
    def place(self) -> Place:
        """The newest that is known."""
        return self._place

    @property
    def readers(self) -> int:
        """How many read."""
        return sum(map(len, self._readers.values()))

    def reader(self, after: Place | None = None, from_step: int | None = None, who: str = "") -> EventReader:
        """Reads the events behind a place; None reads all that are kept.

        from_step: where no place is given, of the newest epoch's events those from a step on. who: shares the readers'
        places with others. Raises MalformedRequest for a place that the run has not reached, or that is of another run
        of its name, and Overloaded.
        """
        if after is not None and after.epoch < self._first_epoch:
            raise MalformedRequest(
                f"Last-Event-ID: {after} is of an earlier run of this name, which was deleted: this one began with "
                f"epoch {self._first_epoch}",
                field="Last-Event-ID",
            )
        if after is not None and after[:2] > self._place[:2]:
            raise MalformedRequest(
                f"Last-Event-ID: the run is at {self._place}, and has not reached {after}", field="Last-Event-ID"
            )
        if after is not None and after > self._place:
            # A clock has gone back: better twice than never.
            after = after._replace(number=0)
        self._make_room(who)
        return EventReader(self, after, from_step, who)

    def _make_room(self, who: str) -> None:
        """Ends a reader of whoever has most, where all places are taken. Raises Overloaded where that is no fairer."""
        if self.readers < _MOST_READERS:
            return
        most = max(self._readers.values(), key=len)
        if len(most) <= len(self._readers.get(who, ())) + 1:
            raise Overloaded(f"the run's events are read by {_MOST_READERS} already")
        most[0].oust()
        self._wake()

    def behind(self, place: Place) -> list[Event]:
        """The kept events behind a place."""
        return self._events[bisect_right(self._events, place, key=lambda event: event.place) :]

    def has_behind(self, place: Place) -> bool:
        """Whether there are any."""
        return bool(self._events) and self._events[-1].place > place

    async def news(self, reader: EventReader, place: Place) -> None:
        """Returns once there are events behind a place, or the reader is told none any more."""
        while self._is_open and not reader.is_ousted and not self.has_behind(place):
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    def gap(self, after: Place | None) -> Event:
        """Tells that what is between a place and the oldest kept event is not known; None: nor is the place."""
        is_counted = after is not None and after.epoch == self._start.epoch
        entries = self._start.seq - after.seq if after is not None and is_counted else None
        step = self._events[0].step if self._events else self._step
        return Event("gap", self._start, step, {"after": after and str(after), "entries": entries})

    def enter(self, reader: EventReader) -> None:
        """One more reads."""
        self._readers.setdefault(reader.who, []).append(reader)

    def leave(self, reader: EventReader) -> None:
        """One reads no more; it may be said again."""
        beside = self._readers.get(reader.who, [])
        if reader in beside:
            beside.remove(reader)
            if not beside:
                del self._readers[reader.who]


class EventReader:
    """One who reads a run's events. A context manager: readers are counted.

    What was there when it began is told event by event. Of what comes later pushes are coalesced where it is behind.
    """

    def __init__(self, events: RunEvents, after: Place | None, from_step: int | None, who: str) -> None:
        self.who = who
        self.is_ousted = False
        """Whether it ends before its time, since its place was needed."""
        self._events = events
        self._from: tuple[int, int] | None = None
        """The epoch of which events before a step are left out, and that step."""
        self._place: Place | None = after
        """Up to where all was told, None where the first is to be a gap."""
        if after is None and from_step is not None:
            epoch = events.place.epoch
            self._from = epoch, from_step
            start = max(events.start, Place(epoch, 0))
            first = next(iter(events.behind(start)), None)
            self._place = start if first is not None and first.step <= from_step else None
        elif after is None:
            self._place = events.start
        self._whole_until = events.place

    def __enter__(self) -> EventReader:
        self._events.enter(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._events.leave(self)

    def oust(self) -> None:
        """Ends it, for another to have its place."""
        self.is_ousted = True
        self._events.leave(self)

    @property
    def is_behind(self) -> bool:
        """Whether there is more of what was there when it began."""
        return self._place is None or (self._place < self._whole_until and self._events.has_behind(self._place))

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more, and never will be."""
        if self.is_ousted:
            return True
        return not (self._events.is_open or self.is_behind or self._place is None) and not self._events.has_behind(
            self._place
        )

    async def news(self) -> None:
        """Returns once there is something to take, or it has ended."""
        if self._place is not None:
            await self._events.news(self, self._place)

    def take(self) -> list[Event]:
        """What is next, a frame of it; a gap alone, where what is next is kept no more."""
        if self._place is None or self._place < self._events.start:
            gap = self._events.gap(self._place)
            self._place = gap.place
            return [gap]
        taken = self._events.behind(self._place)
        if len(taken) > _IN_FRAME and not self.is_behind:
            taken = coalesced(taken)
        taken = taken[:_IN_FRAME]
        if taken:
            self._place = taken[-1].place
        return taken if self._from is None else [event for event in taken if not self._is_left_out(event)]

    def _is_left_out(self, event: Event) -> bool:
        return self._from is not None and event.place.epoch == self._from[0] and event.step < self._from[1]


def _of_push(record: Record, claim: Claim | None) -> dict[str, Any]:
    """What the event of a push tells of it. claim: None where only the record is left of it."""
    return {
        "worker": record.worker,
        "decision": record.decision,
        "reason": record.reason,
        "staleness": record.staleness,
        "loss": claim and claim.loss,
        "samples": claim and claim.samples,
        "units": record.counted,
    }
