"""Locks that a forked child finds open.

A thread of the parent's, which the child does not have, may have held such a lock at the moment of the fork.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from weakref import WeakSet

__all__ = ["ForkLock"]


class ForkLock:
    """A lock for `with`, as threading.Lock; in a forked child nobody holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def reopen(self) -> None:
        """Called in a forked child."""
        self._lock = threading.Lock()


_locks: WeakSet[ForkLock] = WeakSet()


def _reopen_all() -> None:
    for lock in _locks:
        lock.reopen()


os.register_at_fork(after_in_child=_reopen_all)
