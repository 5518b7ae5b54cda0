"""Places for connections: how many there are, and who makes room."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from freestep_service.web.places import Place, Places


def taken(places: Places, host: str, ended: list[Place] | None = None) -> Place:
    place = places.take(host)
    assert place is not None
    if ended is not None:
        place.end = lambda: ended.append(place)
    place.busy()
    return place


def test_places_are_taken_and_given_back() -> None:
    places = Places(2, 2)
    one, _ = taken(places, "a"), taken(places, "b")
    assert places.take("c") is None
    one.leave()
    one.leave()
    assert places.taken == 1
    taken(places, "c")
    assert places.take("d") is None


def test_the_longest_idle_makes_room() -> None:
    ended: list[Place] = []
    places = Places(3, 3)
    made = [taken(places, "a", ended) for _ in range(3)]
    for index in (1, 0, 2):
        made[index].idle()
    made[1].busy()
    made[1].idle()
    for index in (0, 2, 1):
        taken(places, "b")
        assert ended.pop() is made[index]
    assert places.take("b") is None
    assert places.taken == 3


def test_who_has_asked_for_nothing_makes_room_first() -> None:
    ended: list[Place] = []
    places = Places(3, 3)
    worker = taken(places, "a", ended)
    worker.idle()
    silent = [places.take("a"), places.take("a")]
    for each in silent:
        assert each is not None
        each.end = lambda each=each: ended.append(each)  # type: ignore[misc]
    for _ in range(3):
        taken(places, "a")
    assert ended == [*silent, worker]


def test_the_address_with_most_connections_makes_room() -> None:
    ended: list[Place] = []
    places = Places(5, 4)
    quiet = taken(places, "quiet", ended)
    quiet.idle()
    crowd = [taken(places, "crowd", ended) for _ in range(4)]
    for each in crowd:
        each.idle()
    taken(places, "new")
    assert ended == crowd[:1]
    # An address that has all its own makes room of them.
    places = Places(10, 2)
    ended.clear()
    first, second = taken(places, "crowd", ended), taken(places, "crowd", ended)
    assert places.take("crowd") is None
    second.idle()
    taken(places, "crowd")
    assert ended == [second]
    first.leave()


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_a_host_of_ipv6_has_all_of_its_network(one: str, other: str, is_same: bool) -> None:
    places = Places(2, 1)
    taken(places, one)
    assert (places.take(other) is None) is is_same


class Machine(RuleBasedStateMachine):
    """Connections that come, work, idle and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(6, 3)
        self.open: dict[Place, tuple[str, bool]] = {}

    @rule(host=st.sampled_from("abc"))
    def come(self, host: str) -> None:
        of_host = [is_idle for each, is_idle in self.open.values() if each == host]
        is_full = len(of_host) >= 3 and not any(of_host)
        is_full |= len(self.open) >= 6 and not any(is_idle for _, is_idle in self.open.values())
        place = self.places.take(host)
        assert (place is None) is is_full
        if place is not None:
            place.end = lambda: self.end(place)
            self.open[place] = (host, True)

    def end(self, place: Place) -> None:
        assert self.open.pop(place)[1], "it was busy"

    @rule(index=st.integers(0, 5), is_idle=st.booleans())
    def change(self, index: int, is_idle: bool) -> None:
        for place in list(self.open)[index : index + 1]:
            (place.idle if is_idle else place.busy)()
            self.open[place] = (self.open[place][0], is_idle)

    @rule(index=st.integers(0, 5))
    def leave(self, index: int) -> None:
        for place in list(self.open)[index : index + 1]:
            place.leave()
            del self.open[place]

    @invariant()
    def is_bounded(self) -> None:
        hosts = Counter(host for host, _ in self.open.values())
        assert self.places.taken == len(self.open) <= 6
        assert all(count <= 3 for count in hosts.values())


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_places_in_any_order = Machine.TestCase
