"""Locks that a forked child finds open.

A thread of the parent's, which the child does not have, may have held such a lock at the moment of the fork.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

__all__ = ["ForkLock"]


class ForkLock:
    """A lock, `with lock.held`; in a forked child nobody holds it.

    A signal that raises between two instructions of a context manager in Python would leave it locked: so that is the
    interpreter's own. The thread that holds it may take it again, as where it collects what it then has to close.
    """

    def __init__(self) -> None:
        self.held = threading.RLock()
        _locks.add(self)

    def reopen(self) -> None:
        """Called in a forked child."""
        self.held = threading.RLock()


_locks: WeakSet[ForkLock] = WeakSet()


def _reopen_all() -> None:
    for lock in _locks:
        lock.reopen()


os.register_at_fork(after_in_child=_reopen_all)
