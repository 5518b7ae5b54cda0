"""A device of fixed speed: a gradient is computed really, and is there when the device's time for it is over.

So a few cores do for several workers, as long as computing takes less than the device's time; where it took more is
counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Device"]


class Device:
    """seconds: for a gradient. slowness: times of that, by the moment at which it begins."""

    def __init__(
        self,
        seconds: float,
        slowness: Callable[[float], float] = lambda at: 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self._slowness = seconds, slowness
        self._clock, self._sleep = clock, sleep
        self._due: float | None = None

    def begin(self) -> None:
        """A gradient is begun."""
        now = self._clock()
        self._due = now + self._seconds * self._slowness(now)

    def wait(self) -> bool:
        """Waits until its time is over; False if computing has taken longer. Between two gradients it is free."""
        if self._due is None:
            return True
        left, self._due = self._due - self._clock(), None
        if left > 0:
            self._sleep(left)
        return left > 0
