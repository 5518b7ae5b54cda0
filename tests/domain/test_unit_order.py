"""The order of a pass is a permutation by seed and pass, the same on every machine."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

from hypothesis import given
from hypothesis import strategies as st

from freestep.api.validation import LARGEST_INTEGER
from freestep_service.domain.unit_order import UnitOrder

SEEDS = st.integers(0, LARGEST_INTEGER)


def order(units: int, seed: int = 0, number: int = 0) -> list[int]:
    made = UnitOrder(units, seed, number)
    return [made.unit_at(place) for place in range(units)]


@given(st.integers(1, 300), SEEDS, SEEDS)
def test_every_unit_has_one_place(units: int, seed: int, number: int) -> None:
    found = order(units, seed, number)
    assert sorted(found) == list(range(units))
    made = UnitOrder(units, seed, number)
    assert [made.place_of(unit) for unit in found] == list(range(units))


@given(st.integers(1, LARGEST_INTEGER), SEEDS, SEEDS, st.data())
def test_places_of_large_data_sets_are_found_again(units: int, seed: int, number: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, units - 1))
    made = UnitOrder(units, seed, number)
    unit = made.unit_at(place)
    assert 0 <= unit < units and made.place_of(unit) == place


def test_the_order_never_changes() -> None:
    """Units that were handed out keep their examples, whatever version of the service goes on with a run."""
    assert order(10, 0, 0) == [9, 7, 6, 0, 8, 5, 3, 2, 1, 4]
    assert [UnitOrder(10_000_000, 7, 3).unit_at(place) for place in range(4)] == [967312, 7936604, 4223959, 8798476]


def test_seeds_and_passes_have_orders_of_their_own() -> None:
    made = [tuple(order(50, seed, number)) for seed in range(10) for number in range(10)]
    assert len(set(made)) == 100
    assert order(50, 1, 0) != order(50, 0, 1)


def test_all_orders_of_few_units_come_about_as_often() -> None:
    for units in (2, 3, 4):
        orders = set(permutations(range(units)))
        counts = Counter(tuple(order(units, seed)) for seed in range(1000 * len(orders)))
        assert counts.keys() == orders
        # A thousand are expected, with a standard deviation of 31.
        assert all(800 < count < 1200 for count in counts.values())


def test_neighbours_are_torn_apart() -> None:
    found = order(10_000)
    fixed = sum(place == unit for place, unit in enumerate(found))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(found))
    rising = sum(a < b for a, b in pairwise(found))
    assert fixed < 10 and neighbours < 15 and 4800 < rising < 5200
