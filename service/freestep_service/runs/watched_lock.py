"""A lock that says in the log when it is held for longer than anything it guards should take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["WatchedLock"]

logger = logging.getLogger("freestep")

_BOUND_S = 60.0


class WatchedLock:
    """An asyncio.Lock with a watchdog. owner: whose it is, for the log. bound_s: seconds after which the log tells."""

    def __init__(self, owner: str, bound_s: float = _BOUND_S) -> None:
        self._owner = owner
        self._bound_s = bound_s
        self._lock = asyncio.Lock()

    def locked(self) -> bool:
        """Whether it is held."""
        return self._lock.locked()

    @asynccontextmanager
    async def __call__(self, what: str) -> AsyncIterator[None]:
        """Holds the lock while the block runs. what: does so, for the log."""
        async with self._lock:
            watchdog = asyncio.get_running_loop().call_later(self._bound_s, self._warn, what, asyncio.current_task())
            try:
                yield
            finally:
                watchdog.cancel()

    def _warn(self, what: str, task: asyncio.Task[object] | None) -> None:
        frames = task.get_stack() if task is not None else []
        places = ", ".join(f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in frames)
        logger.error("%s: %s has taken more than %g s, at %s", self._owner, what, self._bound_s, places)
