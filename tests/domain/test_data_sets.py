"""How much of data sets has counted, beside a twin that keeps every unit by itself; and units as pushes name them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freestep.api.data import DataSpec
from freestep_service.domain.data_sets import CountedTwice, DataSets, NewDataSet
from freestep_service.domain.marks import LONGEST_MARKS, marks_text, parse_marks
from units_twin import UnitsTwin

SPEC = DataSpec(length=24, unit=2, passes=2)
PUSHES = st.lists(st.tuples(st.sets(st.integers(0, 23), min_size=1, max_size=4), st.booleans()), max_size=12)


def started() -> DataSets:
    made = DataSets()
    made.add(NewDataSet("train", SPEC))
    return made


def done(data: DataSets) -> list[int]:
    each = data.open_units()["train"]
    return [number for number in range(each.reached) if number not in each.open]


@given(PUSHES)
def test_what_has_counted_is_that_of_the_twin(pushes: list[tuple[set[int], bool]]) -> None:
    data, twin = started(), UnitsTwin(SPEC)
    gathered: list[int] = []
    for numbers, advance in pushes:
        marks = {"train": tuple(sorted(numbers))}
        before = data.copy()
        if numbers & set(twin.numbers("done")):
            with pytest.raises(CountedTwice):
                data.count(marks, advance=advance)
            assert data == before
            continue
        data.count(marks, advance=advance)
        twin.set(sorted(numbers), "done")
        gathered = [] if advance else [*gathered, *sorted(numbers)]
        assert data != before
        assert done(data) == twin.numbers("done")
        assert done(data.without_gathered()) == [each for each in twin.numbers("done") if each not in gathered]
        members = json.loads(json.dumps(data.manifest_members()))
        assert DataSets.of(members["data"], members["gathered_units"]) == data


def test_a_data_set_that_there_is_not_has_no_units() -> None:
    with pytest.raises(CountedTwice):
        started().count({"other": (0,)}, advance=True)
    assert DataSets().manifest_members() == {}


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
        st.sets(st.integers(0, 10**15), min_size=1, max_size=20),
        min_size=1,
        max_size=5,
    )
)
def test_units_are_read_as_they_are_written(units: dict[str, set[int]]) -> None:
    marks = {name: tuple(sorted(units[name])) for name in sorted(units)}
    assert parse_marks(marks_text(units)) == marks
    assert parse_marks(marks_text(dict(reversed(units.items())))) == marks


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=1", "a=1;", "a=1;a=2", "a=1,1", "a=01", "a=1 ", "a=+1", "a=٣", "a=" + "1" * LONGEST_MARKS]
)
def test_what_names_no_units_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^"):
        parse_marks(text)
