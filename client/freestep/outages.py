"""What a client logs while a service is away: one line at once, one every 10 seconds, and one when it is back.

While a run is paused for more than a second it logs one line, and one when a push is taken again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from freestep.errors import Overloaded, ShardUnavailable
from freestep.forks import ForkLock

__all__ = ["Outages", "Waiter", "cause_of"]

logger = logging.getLogger("freestep")

_INTERVAL_S = 10.0
"""Seconds between two lines on one outage. Attempts that take longer are logged when they have failed."""
_PAUSED_S = 1.0
"""Seconds after which a pause is logged: those for the moves of a region's run are shorter."""


def cause_of(error: BaseException) -> str:
    """An error as text; some of httpx's have none."""
    return str(error) or type(error).__name__


_BUSY = (Overloaded, ShardUnavailable)
"""Refusals of a service that is there, and of a run that is being opened: they are logged if they last."""


@dataclass(eq=False)
class Waiter:
    """A request that is repeated until it is answered or given up."""

    failed: set[str] = field(default_factory=set)
    """URLs at which it has failed."""


@dataclass
class _Outage:
    began: float
    due: float
    """When the next line is due."""
    is_logged: bool = False
    waiters: set[Waiter] = field(default_factory=set)
    """Requests that have failed in it, and are not at their end."""


class Outages:
    """The outages that the requests of one client meet, each logged once for all of them.

    clock: returns seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = ForkLock()
        self._open: dict[str, _Outage] = {}
        """By URL."""
        self._paused: dict[str, _Outage] = {}
        """By path of a request that a paused run refuses."""

    def failed(self, url: str, error: Exception, left: float, waiter: Waiter) -> None:
        """Notes a failed attempt of a request to a URL, which is repeated for `left` seconds more."""
        waiter.failed.add(url)
        with self._lock.held:
            now = self._clock()
            outage = self._open.setdefault(url, _Outage(now, now + _INTERVAL_S))
            outage.waiters.add(waiter)
            if now < outage.due and (outage.is_logged or isinstance(error, _BUSY)):
                return
            outage.is_logged = True
            outage.due = outage.began + _INTERVAL_S * (1 + int((now - outage.began) / _INTERVAL_S))
        since = f"has been away or busy for {now - outage.began:.0f} s" if now > outage.began else "is away or busy"
        logger.warning("%s %s (%s): requests are repeated for %.0f s", url, since, cause_of(error), left)

    def answered(self, url: str, waiter: Waiter) -> None:
        """Notes that a request was answered, which ends an outage that it has failed in."""
        if url not in waiter.failed:
            return
        with self._lock.held:
            outage = self._open.pop(url, None)
        if outage is not None and outage.is_logged:
            logger.warning("%s answers again, after %.0f s", url, self._clock() - outage.began)

    def paused(self, path: str) -> None:
        """Notes that a paused run has refused a request."""
        with self._lock.held:
            now = self._clock()
            pause = self._paused.setdefault(path, _Outage(now, now + _PAUSED_S))
            if pause.is_logged or now < pause.due:
                return
            pause.is_logged = True
        logger.warning("%s is refused, since the run is paused: it waits until the run is resumed", path)

    def resumed(self, path: str) -> None:
        """Notes that a request was answered, which a paused run may have refused before."""
        if path not in self._paused:
            return
        with self._lock.held:
            pause = self._paused.pop(path, None)
        if pause is not None and pause.is_logged:
            logger.warning("%s goes on, after a pause of %.0f s", path, self._clock() - pause.began)

    def ended(self, waiter: Waiter) -> None:
        """Notes that a request is at its end, answered or not: an outage that nobody waits in is not continued."""
        if not waiter.failed:
            return
        with self._lock.held:
            for url in waiter.failed:
                outage = self._open.get(url)
                if outage is not None:
                    outage.waiters.discard(waiter)
                    if not outage.waiters:
                        del self._open[url]
