"""Where loops over units of data and loaders get these: a data set of an optimizer's run, under the worker's lease."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from freestep.api.data import Claimed
from freestep.api.models import Lease
from freestep.errors import DataNotFound, EpochChanged, FreestepError, LeaseExpired, RunNotInitialized
from freestep.leaving import is_leaving
from freestep.optimizer import RemoteOptimizer
from freestep.run import Run
from freestep.taken_units import TakenUnit
from freestep.unit_stock import StockedUnit, UnitStock

__all__ = ["UnitSource"]

logger = logging.getLogger("freestep")

T = TypeVar("T")

_WAIT_S = 30.0
"""Seconds for which one request waits for a unit."""
_LOOK_EVERY_S = 0.5
"""Seconds between two looks for units by a worker that has no lease meanwhile."""


class UnitSource:
    """A data set of an optimizer's run, which is created unless there is one; units come from `take`.

    asked: the data set's spec. Raises FreestepError where the optimizer cannot be handed units.
    """

    def __init__(self, optimizer: RemoteOptimizer, name: str, asked: Mapping[str, Any]) -> None:
        while hasattr(optimizer, "optimizer"):
            # What libraries have wrapped around it.
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, RemoteOptimizer):
            raise FreestepError(f"units are for freestep's own optimizers, and this is a {type(optimizer).__name__}")
        if not isinstance(optimizer._run, Run):
            raise FreestepError("units are handed out by a service, and a run with url='local' has none")
        if optimizer._worker_group.size > 1:
            raise FreestepError("units are for workers of one process: leave process_group out")
        self.name = name
        self.data = optimizer._run.data(name)
        self.spec = self.data.create(asked).spec
        self._optimizer = optimizer
        self._stock = UnitStock(self._claim, ahead=not self._optimizer._aggregation.takes_one_each)
        self._has_taken = False
        """Whether the current loop has taken a unit."""
        self._warned = False

    @property
    def exhausted(self) -> bool:
        """Whether all units of all passes had counted at the newest claim."""
        return self._stock.exhausted

    def is_exhausted(self) -> bool:
        """Whether all units of all passes have counted by now."""
        return self.exhausted or self.data.status().exhausted

    @property
    def lease(self) -> str:
        """The ID of the worker's lease at this moment."""
        return self._optimizer._membership.granted.lease

    @property
    def has_begin_told(self) -> bool:
        """Whether the training loop says when it begins a batch."""
        return self._optimizer._progress.tells_begin

    def begin(self) -> None:
        """Gives back what an earlier loop was handed and left without a gradient. Raises Closed with the optimizer."""
        self._optimizer._require_open()
        self._optimizer._discard_cut()
        self._has_taken = False
        units = self._optimizer._progress.units
        units.give_back(units.drop_unused(self.data, self._optimizer._gradients.versions()))

    def note(self, stocked: Sequence[StockedUnit]) -> None:
        """Notes that the units are in the hands of the training loop; none where a part of a unit is."""
        self._optimizer._note_units([self._taken(each) for each in stocked])

    def note_cut(self) -> None:
        """Notes that the training loop has trained on a part of a unit which is given back."""
        self._optimizer._progress.has_part = self._optimizer._gradients.are_left()

    def give_back(self, begun: Sequence[StockedUnit] = ()) -> None:
        """Gives back what is in stock, and units that never got to the training loop."""
        if is_leaving() or not self._optimizer._is_open:
            # A loop that outlives the optimizer, whose lease has given all back, or will, or one in a fork.
            return
        left = [*begun, *self._stock.empty()]
        self._optimizer._progress.units.give_back(self._taken(each) for each in left if each.lease.lease == self.lease)

    def _taken(self, stocked: StockedUnit) -> TakenUnit:
        return TakenUnit(self.data, stocked.lease, stocked.unit.unit)

    def take(self) -> StockedUnit | None:
        """The next unit; None where all that is left is out, or has counted."""
        taken = self._with_lease(self._stock.take)
        self._has_taken |= taken is not None
        return taken

    def await_more(self) -> bool:
        """Waits for units that are out with others; False where all have counted, or this worker has to push first."""
        self._optimizer.flush()
        units = self._optimizer._progress.units
        if self.exhausted:
            return False
        if units.has_any():
            self._warn_of_own()
            return False
        units.settle()
        if self._optimizer._aggregation.takes_one_each:
            self._wait_apart()
        while not self._with_lease(lambda lease: self._stock.claim(lease, _WAIT_S)):
            if self.exhausted:
                return False
            holders = ", ".join(f"{each.worker} ({each.units})" for each in self.data.status().holders)
            logger.info("waiting for units of the data set %r, which others have: %s", self.name, holders)
        return True

    def _warn_of_own(self) -> None:
        """Warns once of a loop that ends before it has begun: if nothing is pushed, so will each that follows."""
        if not self._has_taken and not self._warned:
            self._warned = True
            logger.warning(
                "a loop over units of the data set %r has ended before it has begun: others wait for units of this "
                "worker, whose gradients or local steps no push has named; take the step, or call push()",
                self.name,
            )

    def _wait_apart(self) -> None:
        """Waits without a lease, since updates wait for the pushes of all workers that have one."""
        status = self.data.status()
        if status.open or status.exhausted:
            return
        self._optimizer._membership.leave()
        while not (status.open or status.exhausted):
            time.sleep(_LOOK_EVERY_S)
            status = self.data.status()
        self._optimizer._join()

    def _with_lease(self, call: Callable[[Lease], T]) -> T:
        while True:
            try:
                return call(self._optimizer._membership.granted)
            except (LeaseExpired, EpochChanged, RunNotInitialized):
                self._optimizer._regain_lease()
            except DataNotFound:
                self.data.create(self.spec)

    def _claim(self, lease: Lease, count: int, wait: float, key: str) -> Claimed:
        return self.data.claim(lease, count, wait=wait, key=key)
