"""A run out of step with Redis: the three signals of it, and the one wrapper around calls to Redis that raises them.

The law of this file: it signals and waits, and changes nothing. The run's keeper answers the signals in a task of its
own, so no task closes the shard that it is working for, and none cancels itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from freestep.errors import RunNotFound, ShardUnavailable, StepNotReached
from freestep_service.domain.records import Behind, Fenced

__all__ = ["Recovery"]

logger = logging.getLogger("freestep")

T = TypeVar("T")


class Recovery:
    """The signals of one run.

    patience_s: seconds for which a call waits until the run has been opened again.
    """

    def __init__(self, run: str, patience_s: float) -> None:
        self.wanted = asyncio.Event()
        """Set while the keeper has something to do."""
        self.must_catch_up = False
        """Whether entries of the log may have been missed."""
        self.is_deleted = False
        """Whether the run is no more."""
        self._run = run
        self._patience_s = patience_s
        self._openings = 0
        self._reopening: asyncio.Future[None] | None = None

    def look(self) -> None:
        """Something may have changed in Redis: the keeper looks at once."""
        self.wanted.set()

    def fenced(self) -> None:
        """Another process owns a shard that this one took for its own."""
        self.wanted.set()

    def catch_up(self) -> None:
        """Entries of the log may have been missed."""
        self.must_catch_up = True
        self.wanted.set()

    def reopen(self, reason: str) -> None:
        """The run cannot go on from what Redis and the shards have: it is to be opened again."""
        if self._reopening is None:
            logger.warning("run %s is opened again: %s", self._run, reason)
            self._reopening = asyncio.get_running_loop().create_future()
        self.wanted.set()

    @property
    def must_reopen(self) -> bool:
        """Whether the run is to be opened again."""
        return self._reopening is not None

    def reopened(self, error: Exception | None = None) -> None:
        """The keeper has opened the run again, or failed to with an error that those who wait are to raise."""
        reopening, self._reopening = self._reopening, None
        self._openings += 1
        if reopening is None:
            return
        if error is None:
            reopening.set_result(None)
        else:
            reopening.set_exception(error)
            # Those who wait may have left.
            reopening.exception()

    @contextmanager
    def unless_deleted(self) -> Iterator[None]:
        """Turns refusals of a run that is being deleted into RunNotFound."""
        try:
            yield
        except (ShardUnavailable, StepNotReached):
            if self.is_deleted:
                raise RunNotFound(f"there is no run {self._run!r}", run=self._run) from None
            raise

    async def call(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What Redis answers; asked again once the run has been opened again, where Redis has lost data.

        Raises ShardUnavailable where another process owns the shard, or the run does not open in time or is deleted,
        and whatever `ask` raises.
        """
        while True:
            openings = self._openings
            try:
                return await ask()
            except Behind:
                if self.is_deleted:
                    # Nobody opens it again.
                    raise ShardUnavailable("the run is being deleted") from None
                if openings == self._openings:
                    self.reopen("Redis has lost what its shards have seen")
                    await self._wait()
            except Fenced:
                self.fenced()
                raise ShardUnavailable from None

    async def _wait(self) -> None:
        reopening = self._reopening
        if reopening is None:
            return
        done, _ = await asyncio.wait([reopening], timeout=self._patience_s)
        if not done:
            raise ShardUnavailable(f"the run {self._run!r} is still being opened", missing=[])
        reopening.result()
