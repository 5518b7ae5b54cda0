"""What has happened to a run beside its pushes is kept by kind, within bounds."""

from __future__ import annotations

import json

from freestep_service.domain.events import Event, Place
from freestep_service.domain.milestones import Milestones


def happened(kind: str, seq: int, **members: object) -> Event:
    return Event(kind, Place(1, seq), seq, members)


def told(milestones: Milestones) -> list[tuple[str, int]]:
    return [(each["kind"], each["step"]) for each in (json.loads(each.event) for each in milestones.all())]


def test_events_that_curves_tell_of_are_none() -> None:
    milestones = Milestones()
    for kind in ("push", "update", "metric", "epoch", "gap"):
        milestones.add(happened(kind, 1), 1.0)
    assert milestones.all() == []


def test_one_kind_does_not_take_the_place_of_another() -> None:
    milestones = Milestones()
    milestones.add(happened("lease", 0, worker="w", change="granted"), 0.0)
    for seq in range(1, 1000):
        milestones.add(happened("checkpoint", seq), float(seq))
    assert told(milestones) == [("lease", 0), *(("checkpoint", seq) for seq in range(744, 1000))]


def test_long_ones_are_fewer() -> None:
    milestones = Milestones()
    for seq in range(10):
        milestones.add(happened("control", seq, changes="x" * 20_000), float(seq))
    assert told(milestones) == [("control", 7), ("control", 8), ("control", 9)]
    milestones.add(happened("control", 10, changes="x" * 100_000), 10.0)
    assert told(milestones) == [("control", 10)]


def test_they_come_back_from_storage_in_the_order_of_their_times() -> None:
    milestones = Milestones()
    milestones.add(happened("data", 2, name="train"), 2.5)
    milestones.add(happened("lease", 1, worker="w", change="granted"), 1.5)
    read = Milestones.from_document(json.loads(json.dumps(milestones.to_document())))
    assert read.all() == milestones.all()
    assert [each.time for each in read.all()] == [1.5, 2.5]
    assert told(Milestones.from_document({})) == []
