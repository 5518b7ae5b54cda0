"""How much of a run's data sets has counted, as a function of its log: as shards, checkpoints and exports hold it.

Who has which unit is known to Redis alone. Units are handed out in the order of their numbers, so what is kept here
grows with the units that are out or given back, and not with a data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from freestep.api.data import DataSpec, DataState
from freestep_service.domain.marks import Marks

__all__ = ["CountedTwice", "DataSets", "NewDataSet", "OpenUnits"]


class NewDataSet(NamedTuple):
    """A data set that is added to a run."""

    name: str
    spec: DataSpec


class CountedTwice(Exception):
    """A push of the log names a unit that has counted before, or a data set that there is not."""


class _Progress:
    """One data set: all units below `reached` have counted, but for those in `open`."""

    def __init__(self, spec: DataSpec, reached: int = 0, open_units: Iterable[int] = ()) -> None:
        self.spec = spec
        self.reached = reached
        self.open = set(open_units)

    def copy(self) -> _Progress:
        return _Progress(self.spec, self.reached, self.open)

    def has_counted(self, number: int) -> bool:
        return number < self.reached and number not in self.open

    def count(self, number: int) -> None:
        if number >= self.reached:
            self.open.update(range(self.reached, number))
            self.reached = number + 1
        else:
            self.open.remove(number)

    def reopen(self, number: int) -> None:
        self.open.add(number)
        # As if it had never been reached, so that equal states are equal texts.
        while self.reached and self.reached - 1 in self.open:
            self.reached -= 1
            self.open.remove(self.reached)

    def state(self) -> DataState:
        return DataState(spec=self.spec, reached=self.reached, open=tuple(_ranges(sorted(self.open))))


class OpenUnits(NamedTuple):
    """A data set as Redis takes it up: all units below `reached` have counted but the `open` ones, in order."""

    spec: DataSpec
    reached: int
    open: list[int]


class DataSets:
    """The data sets of a run, as of a place in its log."""

    def __init__(self) -> None:
        self._sets: dict[str, _Progress] = {}
        self._gathered: list[tuple[str, int]] = []
        """Units of the pushes in the update that is being gathered."""

    @classmethod
    def of(cls, states: Mapping[str, Any], gathered: Iterable[Sequence[Any]] = ()) -> DataSets:
        """Of DataStates by name, and of what `gathered` has given. Raises ValidationError."""
        made = cls()
        for name, document in states.items():
            state = DataState.model_validate(document)
            made._sets[name] = _Progress(state.spec, state.reached, _numbers(state.open))
        made._gathered = [(name, number) for name, number in gathered]
        return made

    def copy(self) -> DataSets:
        made = DataSets()
        made._sets = {name: progress.copy() for name, progress in self._sets.items()}
        made._gathered = list(self._gathered)
        return made

    def __bool__(self) -> bool:
        return bool(self._sets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSets) and self.states() == other.states() and self._gathered == other._gathered

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DataSets.of({self.states()}, {self._gathered})"

    @property
    def gathered(self) -> list[tuple[str, int]]:
        """Name and number of the units whose pushes wait for their update."""
        return list(self._gathered)

    def add(self, new: NewDataSet) -> None:
        """Adds a data set, of which nothing has counted."""
        self._sets[new.name] = _Progress(new.spec)

    def count(self, marks: Marks, *, advance: bool) -> None:
        """Counts the units of a push; advance: whether what was gathered becomes an update with it.

        Raises CountedTwice, and has changed nothing then.
        """
        for name, numbers in marks.items():
            progress = self._sets.get(name)
            if progress is None or any(progress.has_counted(number) for number in numbers):
                raise CountedTwice(f"units of {name} have counted before, or there is no such data set")
        for name, numbers in marks.items():
            for number in numbers:
                self._sets[name].count(number)
                self._gathered.append((name, number))
        if advance:
            self._gathered.clear()

    def without_gathered(self) -> DataSets:
        """A copy without the pushes that wait for their update: their units are open."""
        made = self.copy()
        for name, number in made._gathered:
            made._sets[name].reopen(number)
        made._gathered.clear()
        return made

    def open_units(self) -> dict[str, OpenUnits]:
        """Each data set as Redis takes it up, by name."""
        return {name: OpenUnits(each.spec, each.reached, sorted(each.open)) for name, each in self._sets.items()}

    def states(self) -> dict[str, DataState]:
        """Each data set by name."""
        return {name: progress.state() for name, progress in self._sets.items()}

    def manifest_members(self) -> dict[str, Any]:
        """As JSON members of a checkpoint's manifest; none where there are no data sets."""
        if not self._sets:
            return {}
        states = {name: state.model_dump(mode="json") for name, state in self.states().items()}
        return {"data": states, "gathered_units": self.gathered}


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [begin, end)."""
    begin = end = None
    for number in numbers:
        if begin is None or number != end:
            if begin is not None and end is not None:
                yield begin, end
            begin = number
        end = number + 1
    if begin is not None and end is not None:
        yield begin, end


def _numbers(ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    for begin, end in ranges:
        yield from range(begin, end)
