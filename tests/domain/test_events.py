"""Places of events, and pushes that become one event."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freestep.api.events import OtherEvent, PushEvent, event_of
from freestep_service.domain.events import Event, Place, coalesced

NUMBERS = st.integers(0, 10**16 - 1)
PUSH = {
    "worker": "w",
    "decision": "applied",
    "reason": None,
    "staleness": 0,
    "loss": 0.5,
    "samples": None,
    "units": {"train": (1, 2)},
}


@given(NUMBERS, NUMBERS, NUMBERS)
def test_a_place_is_read_as_it_was_written(epoch: int, seq: int, number: int) -> None:
    place = Place(epoch, seq, number)
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "1-2.", "01-2", "1-2-3", "1-2.3.4", " 1-2", "1_0-2", "1-" + "9" * 17]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Place.parse(text)


def test_places_rise_with_epochs_then_entries_then_numbers() -> None:
    places = [Place(1, 9, 7), Place(2, 3), Place(2, 3, 1), Place(2, 3, 2), Place(2, 10)]
    assert sorted(reversed(places)) == places


@given(st.lists(st.sampled_from(["push", "metric"])))
def test_coalesced_pushes_are_counted_and_keep_the_last_place(kinds: list[str]) -> None:
    events = [Event(kind, Place(1, seq), seq) for seq, kind in enumerate(kinds, 1)]
    made = coalesced(events)
    assert sum(event.members.get("coalesced", 1) for event in made) == len(events)
    assert [event.kind for event in made if event.kind != "push"] == [kind for kind in kinds if kind != "push"]
    assert not any(one.kind == other.kind == "push" for one, other in pairwise(made))
    assert [event.place for event in made[-1:]] == [event.place for event in events[-1:]]


def test_an_event_is_what_its_model_reads() -> None:
    event = event_of(json.loads(Event("push", Place(3, 7), 5, PUSH).to_json()))
    assert event == PushEvent(kind="push", id="3-7", epoch=3, step=5, **{**PUSH, "units": {"train": [1, 2]}})


def test_kinds_to_come_are_read_too() -> None:
    event = event_of({"kind": "later", "id": "1-2", "epoch": 1, "step": 2, "by": "me"})
    assert isinstance(event, OtherEvent)
    assert event.model_dump()["by"] == "me"
