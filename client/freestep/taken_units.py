"""The units of data that gradients are taken on: from a worker's first sight of them until a push names them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from freestep.api.data import MOST_PUSHED
from freestep.api.models import Lease
from freestep.data_set import DataSet
from freestep.errors import DataNotFound, EpochChanged, FreestepError, LeaseExpired, RunNotFound, RunNotInitialized

__all__ = ["TakenUnit", "TakenUnits", "by_name"]

logger = logging.getLogger("freestep")

Versions = frozenset[tuple[int, int]]
"""Identity and version of each gradient at a moment."""
_NONE: Versions = frozenset()


@dataclass(frozen=True)
class TakenUnit:
    """A unit of a data set that a lease holds, by its number."""

    data: DataSet
    lease: Lease
    number: int


class TakenUnits:
    """The units that a worker was handed and no push has named yet.

    A unit belongs to the gradient, or to the progress of a round, that was taken on it: it is pushed with that, and
    given back where that is discarded. It is handed over before. So the units that were followed by a change of the
    gradients are those that zero_grad clears the gradients of, and the others have none yet.
    """

    def __init__(self) -> None:
        self._next: list[tuple[TakenUnit, Versions]] = []
        self._of_round: list[TakenUnit] = []
        self._owed: list[TakenUnit] = []
        """To be given back, once the service can be reached."""
        self._is_used = False
        self._has_news = False
        self._warned = False

    def add(self, units: Iterable[TakenUnit], gradients: Iterable[tuple[int, int]]) -> None:
        """Notes what the next gradient is taken on: maybe no unit, where that is a part of one which goes on.

        gradients: identity and version of each gradient at this moment.
        """
        versions = frozenset(gradients)
        self._next += [(unit, versions) for unit in units]
        self._is_used = self._has_news = True

    def has_any(self) -> bool:
        """Whether there are units that wait for a push."""
        return bool(self._next or self._of_round)

    @property
    def of_round(self) -> Sequence[TakenUnit]:
        """Those that local steps of the unfinished round were taken on."""
        return tuple(self._of_round)

    def keep_for_round(self) -> None:
        """Notes that a local step was taken on the units: they are part of the round, whatever zero_grad clears."""
        self._of_round += [unit for unit, _ in self._next]
        self._next.clear()

    def take(self, run: str) -> list[TakenUnit]:
        """The units for a push, which has them from now on; warns once of a push whose step followed no unit."""
        if self._is_used and not self._has_news and not self._warned:
            self._warned = True
            logger.warning(
                "a step of the run %s was taken on no new unit of data: a unit counts with the first step after it was "
                "handed over, so take one step for each",
                run,
            )
        self._has_news = False
        self.keep_for_round()
        taken, self._of_round = self._of_round, []
        return taken

    def restore(self, units: Sequence[TakenUnit]) -> None:
        """Takes back the units of a push of which it is not known whether it counted, and whose gradients are there."""
        self._next = [*((unit, _NONE) for unit in units), *self._next]

    def drop_used(self, gradients: Iterable[tuple[int, int]]) -> list[TakenUnit]:
        """Removes the units whose gradients are there at this moment, before they are cleared."""
        now = frozenset(gradients)
        used = [unit for unit, before in self._next if not now <= before]
        self._next = [(unit, before) for unit, before in self._next if now <= before]
        return used

    def note_cleared(self, gradients: Iterable[tuple[int, int]]) -> None:
        """Notes that gradients were cleared, which is no use of a unit."""
        versions = frozenset(gradients)
        self._next = [(unit, versions) for unit, _ in self._next]

    def drop_unused(self, data: DataSet, gradients: Iterable[tuple[int, int]]) -> list[TakenUnit]:
        """Removes the units of a data set that were followed by no gradient which is there at this moment."""
        now = frozenset(gradients)
        unused = [unit for unit, before in self._next if unit.data.name == data.name and now <= before]
        self._next = [(unit, before) for unit, before in self._next if unit not in unused]
        return unused

    def drop_round(self) -> list[TakenUnit]:
        """Removes the units of the round, whose progress is discarded."""
        dropped, self._of_round = self._of_round, []
        return dropped

    def give_back(self, units: Iterable[TakenUnit]) -> None:
        """Gives units back; what the service cannot be told now, it is told by a later call."""
        self._owed += units
        try:
            self.settle()
        except FreestepError as error:
            logger.debug("units of data could not be given back yet: %s", error)

    def settle(self) -> None:
        """Gives back what is still owed. Raises FreestepError if the service cannot be told."""
        while self._owed:
            first = self._owed[0]
            same = [unit for unit in self._owed if unit.data is first.data and unit.lease.lease == first.lease.lease]
            # One request names no more.
            same = same[:MOST_PUSHED]
            try:
                first.data.give_back(first.lease, [unit.number for unit in same])
            except (LeaseExpired, EpochChanged, RunNotFound, RunNotInitialized, DataNotFound):
                pass  # They are open already.
            self._owed = [unit for unit in self._owed if unit not in same]


def by_name(units: Iterable[TakenUnit]) -> dict[str, list[int]]:
    """The numbers of units by their data set's name, as a claim takes them."""
    found: dict[str, list[int]] = {}
    for unit in units:
        found.setdefault(unit.data.name, []).append(unit.number)
    return found
