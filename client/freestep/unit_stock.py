"""Units of data that a worker holds and has not begun; more are claimed in the background while it works."""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from freestep.api.data import Claimed, Unit
from freestep.api.models import Lease
from freestep.threads import result_of, run_in_background

__all__ = ["StockedUnit", "UnitStock"]

logger = logging.getLogger("freestep")

_MOST = 256
_SHORT_S, _LONG_S = 0.5, 2.0
"""Seconds between two claims: below the first, twice as many units are claimed at once, and above the second half as
many. So a claim costs little, and a worker that dies, or others that have nothing left, wait for little."""


@dataclass(frozen=True)
class StockedUnit:
    """A unit, and the lease that holds it."""

    unit: Unit
    lease: Lease


class UnitStock:
    """The units of one data set that a worker holds and has not begun.

    claim: asks the service for a number of units, and waits for so many seconds where others have all that is left; a
    claim that was not answered is made again under its key, so that its units are not out with nobody.
    ahead: whether units are claimed before they are needed. clock: returns seconds, from any origin.

    Its methods are called from one thread.
    """

    def __init__(
        self,
        claim: Callable[[Lease, int, float, str], Claimed],
        *,
        ahead: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exhausted = False
        """Whether all units of all passes had counted at the newest claim."""
        self._claim = claim
        self._ahead = ahead
        self._clock = clock
        self._units: deque[StockedUnit] = deque()
        self._count = 1
        """How many the next claim asks for."""
        self._claimed_at: float | None = None
        self._under_way: tuple[Lease, Future[Claimed]] | None = None
        self._key = uuid.uuid4().hex
        """Of the next claim, or of one that was not answered."""

    def take(self, lease: Lease) -> StockedUnit | None:
        """The next unit that the lease holds; None where all that is left is out, with this worker or with others.

        Raises what a claim does.
        """
        if not self._next(lease):
            self._collect()
        if not self._next(lease):
            self.claim(lease)
        if not self._next(lease):
            return None
        taken = self._units.popleft()
        if self._under_way is not None and self._under_way[1].done():
            self._collect()
        if self._ahead and self._under_way is None and 2 * len(self._units) < self._count:
            self._begin(lease)
        return taken

    def claim(self, lease: Lease, wait: float = 0.0) -> bool:
        """Claims units now; whether there are any. Raises what a claim does."""
        self._add(lease, self._claim(lease, self._fitted_count(), wait, self._key))
        return bool(self._units)

    def empty(self) -> list[StockedUnit]:
        """Takes out all that is left."""
        self._collect()
        left = list(self._units)
        self._units.clear()
        return left

    def _next(self, lease: Lease) -> bool:
        while self._units and self._units[0].lease.lease != lease.lease:
            self._units.popleft()
        return bool(self._units)

    def _fitted_count(self) -> int:
        if not self._ahead:
            return 1
        now = self._clock()
        if self._claimed_at is not None:
            since = now - self._claimed_at
            if since < _SHORT_S:
                self._count = min(2 * self._count, _MOST)
            elif since > _LONG_S:
                self._count = max(self._count // 2, 1)
        self._claimed_at = now
        return self._count

    def _begin(self, lease: Lease) -> None:
        count, key = self._fitted_count(), self._key
        self._under_way = lease, run_in_background("freestep-units", lambda: self._claim(lease, count, 0.0, key))

    def _collect(self) -> None:
        if self._under_way is None:
            return
        lease, future = self._under_way
        try:
            self._add(lease, result_of(future))
        except Exception as error:
            # The next claim, which is made when units are needed, will say what is wrong.
            logger.debug("units of data could not be claimed ahead: %s", error)
        # Last: where the wait is interrupted, its units are waited for by the next call.
        self._under_way = None

    def _add(self, lease: Lease, claimed: Claimed) -> None:
        self._units += [StockedUnit(unit, lease) for unit in claimed.units]
        self._key = uuid.uuid4().hex
        self.exhausted = claimed.exhausted
