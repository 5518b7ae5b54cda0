"""Memory that is counted before it is used."""

from __future__ import annotations

import os
import threading

__all__ = ["MemoryBudget", "machine_memory"]


class MemoryBudget:
    """`total` bytes, of which parts are taken and given back; safe to use from several threads."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._lock = threading.Lock()

    def try_reserve(self, size: int) -> bool:
        """Takes `size` bytes, if they are there."""
        with self._lock:
            if self._used + size > self.total:
                return False
            self._used += size
            return True

    def release(self, size: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._used -= size


def machine_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
