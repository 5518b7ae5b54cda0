"""Background tasks: kept until they end, and their errors logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from freestep.errors import FreestepError

__all__ = ["Background"]

logger = logging.getLogger("freestep")


class Background:
    """The background tasks of one owner, whose name begins their log lines."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, object], failure: str) -> asyncio.Task[None]:
        """Runs work in a task of its own. failure: what the log says did not happen, where it raises."""
        task = asyncio.get_running_loop().create_task(self._run(work, failure))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, work: Coroutine[Any, Any, object], failure: str) -> None:
        try:
            await work
        except FreestepError as error:
            logger.warning("%s: %s: %s", self._owner, failure, error)
        except Exception:
            logger.exception("%s: %s", self._owner, failure)

    async def settle(self) -> None:
        """Returns when all have ended, those that they spawned too."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
