"""How long a push was in each phase of its way through a shard."""

from __future__ import annotations

import time

__all__ = ["PHASES", "Phases"]

PHASES = ("admit", "queue", "receive", "commit", "update", "answer")
"""Redis looks at its claim; it waits for memory; its body comes; it is decided; it is applied; y is sent."""


class Phases:
    """The phases of one push, each from the end of the one before."""

    __slots__ = ("_at", "began", "ends")

    def __init__(self) -> None:
        self.began = self._at = time.monotonic()
        self.ends: list[tuple[str, float, float]] = []
        """Each phase with its begin and its end, by the monotonic clock."""

    def ended(self, phase: str) -> None:
        """A phase is over."""
        now = time.monotonic()
        self.ends.append((phase, self._at, now))
        self._at = now

    def seconds(self) -> dict[str, float]:
        """How long each phase was. A push may be in one twice: it may wait for memory before and after `admit`."""
        found: dict[str, float] = {}
        for phase, began, ended in self.ends:
            found[phase] = found.get(phase, 0.0) + ended - began
        return found
