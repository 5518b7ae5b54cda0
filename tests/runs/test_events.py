"""The newest events of a run and those who read them, with a clock that the test sets."""

from __future__ import annotations

import asyncio

import pytest

from freestep.errors import MalformedRequest, Overloaded
from freestep_service.domain.events import Event, Place
from freestep_service.domain.records import CheckpointId, Claim, Record
from freestep_service.domain.reports import Measured
from freestep_service.runs.events import EventReader, RunEvents
from freestep_service.state.log import Entry

KEPT = 8


class Log:
    """A run's log, whose entries its events are told of."""

    def __init__(self, kept: int = KEPT) -> None:
        self.now = 1000
        self.events = RunEvents(lambda: self.now, kept)
        self.seq = 0
        self.epoch = 1
        self.begin()

    def begin(self) -> None:
        self.events.begin(self.epoch, self.seq, self.seq)

    def push(self, count: int = 1, decision: str = "applied", units: str = "") -> None:
        for _ in range(count):
            self.seq += 1
            claim = Claim("l", 1, 0, "k", loss=0.5, units={})
            record = Record(f"l 1 0 None {units}".strip(), {}, decision, self.seq, 0, self.seq, 1, "w", self.epoch)
            advance = decision == "applied"
            entry = Entry(
                self.seq, self.epoch, advance=advance, record=record, claim=claim, units=record.counted, worker="w"
            )
            self.events.took(entry)


@pytest.fixture
def log() -> Log:
    return Log()


def told(reader: EventReader) -> list[str]:
    """The kinds and places of all that a reader takes now."""
    found: list[str] = []
    while events := reader.take():
        found += [f"{event.kind} {event.place}" for event in events]
    return found


def test_entries_have_their_places_and_others_are_numbered_behind_them(log: Log) -> None:
    log.push()
    log.events.lease("granted", "w")
    log.events.lease("released", "w")
    log.now = 5000
    log.events.checkpoint(CheckpointId(1, 1, 1))
    log.push()
    assert told(log.events.reader()) == [
        "epoch 1-0.1001",
        "push 1-1",
        "lease 1-1.1000",
        "lease 1-1.1001",
        "checkpoint 1-1.5000",
        "push 1-2",
    ]


def test_every_kind_of_entry_is_told(log: Log) -> None:
    log.events.took(Entry(1, 1, advance=False, measured=Measured("loss", 0, 0.5)))
    log.events.took(Entry(2, 1, advance=True))
    log.events.took(Entry(3, 1, advance=False, reads={"t": "y F32"}))
    metric, update = log.events.reader().take()[1:]
    assert (metric.kind, metric.members) == ("metric", {"name": "loss", "value": 0.5, "measured_at": 0})
    assert (update.kind, update.step) == ("update", 1)
    assert log.events.place == Place(1, 3)


def test_a_checkpoint_and_owners_are_told_once(log: Log) -> None:
    for _ in range(2):
        log.events.checkpoint(CheckpointId(1, 4, 4))
        log.events.shards({0: "http://a", 1: None})
    log.events.shards({0: "http://a", 1: "http://b"})
    owners = [event.members.get("owners") for event in log.events.reader().take()[1:]]
    assert owners == [None, ["http://a", None], ["http://a", "http://b"]]


def test_a_reader_goes_on_behind_its_place(log: Log) -> None:
    log.push(3)
    first = log.events.reader()
    *_, last = first.take()
    log.push(2)
    assert told(first) == told(log.events.reader(last.place)) == ["push 1-4", "push 1-5"]
    assert told(first) == []


def test_what_is_kept_no_more_is_told_of_as_a_gap(log: Log) -> None:
    log.push(3)
    slow = log.events.reader()
    slow.take()
    log.push(3 * KEPT)
    gap, *rest = told(slow)
    oldest = log.events.behind(Place(0, 0))[0].place
    assert gap == f"gap {log.events.start}" and rest[0] == f"push {oldest}"
    assert len(rest) >= KEPT
    event = log.events.reader(Place(1, 3)).take()[0]
    assert event.members == {"after": "1-3", "entries": log.events.start.seq - 3}
    assert log.events.reader(Place(0, 7)).take()[0].members == {"after": "0-7", "entries": None}


def test_units_bound_what_is_kept() -> None:
    log = Log(kept=4096)
    thousand = "train=" + ",".join(str(number) for number in range(1000))
    log.push(200, units=thousand)
    kept = log.events.behind(log.events.start)
    assert sum(len(event.members["units"]["train"]) for event in kept) <= 66_000


def test_a_new_epoch_goes_on_and_the_same_one_elsewhere_is_a_gap(log: Log) -> None:
    log.push(2)
    log.epoch, log.seq = 2, 1
    log.begin()
    assert told(log.events.reader(Place(1, 2))) == ["epoch 2-1.1000"]
    log.begin()
    assert told(log.events.reader(Place(2, 1, 1000))) == []
    log.events.end()
    log.seq, log.now = 6, 2000
    log.begin()
    assert told(log.events.reader(Place(2, 1))) == ["gap 2-6.2000", "epoch 2-6.2001"]
    assert log.events.reader(Place(2, 1)).take()[0].members["entries"] == 5


def test_a_restart_after_all_entries_were_told_lacks_none(log: Log) -> None:
    log.push(2)
    log.events.end()
    log.now = 2000
    log.begin()
    log.push()
    gap, *rest = log.events.reader(Place(1, 2)).take() + log.events.reader(Place(1, 2, 2000)).take()
    assert gap.members["entries"] == 0
    assert [event.place for event in rest] == [Place(1, 2, 2001), Place(1, 3)]


def test_a_clock_that_goes_back_hides_nothing(log: Log) -> None:
    log.events.lease("granted", "w")
    newest = log.events.place
    log.events.end()
    log.now = 10
    log.begin()
    assert newest > log.events.place
    assert told(log.events.reader(newest))[0].startswith("gap ")


def test_a_place_that_is_not_reached_is_refused(log: Log) -> None:
    log.push()
    for place in (Place(1, 2), Place(2, 0)):
        with pytest.raises(MalformedRequest) as refused:
            log.events.reader(place)
        assert refused.value.extensions["field"] == "Last-Event-ID"


def test_a_reader_may_begin_with_a_step(log: Log) -> None:
    log.push(6)
    assert told(log.events.reader(from_step=5)) == ["push 1-5", "push 1-6"]
    late = log.events.reader(from_step=8)
    assert told(late) == []
    log.push(2)
    assert told(late) == ["push 1-8"]
    log.push(KEPT * 3)
    gap, *rest = told(log.events.reader(from_step=2))
    assert gap.startswith("gap ") and rest


def test_pushes_are_coalesced_for_who_is_behind_and_not_for_who_catches_up() -> None:
    log = Log(kept=4096)
    log.push(600)
    catching_up = log.events.reader()
    log.push(600)
    events: list[Event] = []
    while catching_up.is_behind:
        taken = catching_up.take()
        assert len(taken) <= 256
        events += taken
    assert [event.place.seq for event in events] == list(range(events[-1].place.seq + 1))
    (rest,) = catching_up.take()
    assert rest.place == Place(1, 1200)
    assert rest.members["coalesced"] + events[-1].place.seq == 1200


def test_frames_are_bounded_whatever_is_in_them() -> None:
    log = Log(kept=4096)
    reader = log.events.reader()
    for _ in range(1000):
        log.events.lease("granted", "w")
    sizes = []
    while taken := reader.take():
        sizes.append(len(taken))
    assert max(sizes) <= 256 and sum(sizes) == 1001


def test_readers_are_counted(log: Log) -> None:
    readers = [log.events.reader().__enter__() for _ in range(100)]
    with pytest.raises(Overloaded):
        log.events.reader()
    readers[0].__exit__()
    log.events.reader()


def test_who_has_most_readers_makes_room_for_others(log: Log) -> None:
    async def work() -> None:
        greedy = [log.events.reader(who="greedy").__enter__() for _ in range(100)]
        greedy[0].take()
        waiting = asyncio.ensure_future(greedy[0].news())
        await asyncio.sleep(0)
        other = log.events.reader(who="other").__enter__()
        await waiting
        assert greedy[0].has_ended and not greedy[1].has_ended and not other.has_ended
        greedy[0].__exit__()
        assert log.events.readers == 100
        with pytest.raises(Overloaded):
            log.events.reader(who="greedy")
        others = [log.events.reader(who="other").__enter__() for _ in range(49)]
        assert [reader.has_ended for reader in greedy] == [True] * 50 + [False] * 50
        for who in "other", "greedy":
            with pytest.raises(Overloaded):
                log.events.reader(who=who)
        for reader in [*greedy, other, *others]:
            reader.__exit__()
        assert log.events.readers == 0

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_place_that_is_none_takes_no_reader_away(log: Log) -> None:
    greedy = [log.events.reader(who="greedy").__enter__() for _ in range(100)]
    with pytest.raises(MalformedRequest):
        log.events.reader(Place(9, 9), who="other")
    assert not any(reader.has_ended for reader in greedy)


def test_readers_hear_of_news_and_of_the_end(log: Log) -> None:
    async def work() -> None:
        reader = log.events.reader()
        reader.take()
        waiting = asyncio.ensure_future(reader.news())
        await asyncio.sleep(0)
        assert not waiting.done()
        log.push()
        await waiting
        reader.take()
        waiting = asyncio.ensure_future(reader.news())
        await asyncio.sleep(0)
        log.events.end()
        await waiting
        assert reader.has_ended

    asyncio.run(asyncio.wait_for(work(), 30))


def test_nothing_is_told_before_the_run_is_here() -> None:
    events = RunEvents(lambda: 1)
    events.lease("granted", "w")
    events.took(Entry(1, 1, advance=True))
    assert events.behind(Place(0, 0)) == []
