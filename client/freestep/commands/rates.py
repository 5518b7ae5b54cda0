"""How fast things that count go, by looks at their counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

__all__ = ["Rates"]

_WINDOW_S = 10.0
"""Seconds over which a rate is measured."""


class Rates:
    """The rates of counts by name, over the last seconds."""

    def __init__(self) -> None:
        self._looks: dict[str, deque[tuple[float, int]]] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Forgets all others."""
        self._looks = {name: self._looks.get(name, deque()) for name in names}

    def measure(self, name: str, count: int, now: float) -> float | None:
        """The rate of a count, in 1/s; None where it is seen for the first time, or has begun anew.

        now: the time of the look, in seconds.
        """
        looks = self._looks.setdefault(name, deque())
        if looks and count < looks[-1][1]:
            looks.clear()
        looks.append((now, count))
        while len(looks) > 2 and now - looks[1][0] >= _WINDOW_S:
            looks.popleft()
        begun, first = looks[0]
        return (count - first) / (now - begun) if now > begun else None
