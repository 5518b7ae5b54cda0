"""The tasks that look after one run: its heartbeat, its leases, its checkpoints.

The law of this file: a run's tasks are its own, so that one that opens, or hangs, holds up no other; and no error ends
them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from freestep.errors import CoordinatorUnavailable, FreestepError
from freestep_service.domain.records import LogTruncated
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.data_units import DataUnits
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.leases import Leases
from freestep_service.runs.ownership import Ownership
from freestep_service.runs.recovery import Recovery
from freestep_service.storage.checksummed import Damaged

__all__ = ["Keeper"]

logger = logging.getLogger("freestep")

_HOUSEKEEPING_S = 0.1
_IDLE_S = 0.5
"""Seconds between two rounds of housekeeping where no lease is known to be live."""
_SOONEST_HEARTBEAT_S = 0.02
"""Seconds between two heartbeats at least, however many signals ask for one."""


class Keeper:
    """Looks after one run, from `start` to `stop`."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        ownership: Ownership,
        dispatch: Dispatch,
        leases: Leases,
        checkpointing: Checkpointing,
        data: DataUnits,
    ) -> None:
        self._context = context
        self._recovery = recovery
        self._ownership = ownership
        self._dispatch = dispatch
        self._leases = leases
        self._checkpointing = checkpointing
        self._data = data
        self._pause_s = context.resources.node.heartbeat_s
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._errors: dict[str, str] = {}
        """What each kind of work failed with last, so that it is logged once."""

    def start(self) -> None:
        """Begins; the first heartbeat is at once."""
        for work in (self._beat, self._prolong, self._keep_house):
            self._tasks.append(asyncio.create_task(work()))

    @property
    def problem(self) -> str | None:
        """What its kinds of work fail with; None while none does."""
        return "; ".join(self._errors.values()) or None

    async def stop(self) -> None:
        """Ends the tasks when they have done what they are at."""
        # Not cancelled: a command cut short would leave its connection, and a checkpoint its thread, behind.
        self._stopping.set()
        self._recovery.look()
        await asyncio.gather(*self._tasks)

    async def _beat(self) -> None:
        """Heartbeats: regular ones, and at once where a signal asks for one."""
        while not self._stopping.is_set():
            await self.look()
            if await self._stops(_SOONEST_HEARTBEAT_S):
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._recovery.wanted.wait()

    async def look(self) -> None:
        """One heartbeat, which answers the signals that there are."""
        self._recovery.wanted.clear()
        if self._recovery.must_catch_up:
            self._recovery.must_catch_up = False
            await self._try("its log", self._catch_up)
        await self._try("its heartbeat", self._ownership.keep)
        await self._try("the count of its units", lambda: self._data.count(self._ownership.view))

    async def _catch_up(self) -> None:
        try:
            await self._dispatch.catch_up()
        except LogTruncated as error:
            self._recovery.reopen(str(error))
        except CoordinatorUnavailable:
            # What was missed is read when Redis is back.
            self._recovery.must_catch_up = True
            raise

    async def _prolong(self) -> None:
        """Keeps what is owned while a heartbeat takes its time."""
        while not await self._stops(self._pause_s):
            await self._try("its ownership", self._ownership.prolong)

    async def _keep_house(self) -> None:
        """Ends leases that have run out, and writes checkpoints that are due, and the history."""
        while not await self._stops(_IDLE_S if self._leases.are_idle else _HOUSEKEEPING_S):
            await self._try("its leases", self._leases.expire)
            if self._checkpointing.is_due():
                self._context.background.spawn(self._checkpointing.write_or_retry(), "a checkpoint was not written")
            if self._context.history.is_due():
                self._context.background.spawn(self._context.history.save(), "its history was not saved")

    async def _stops(self, pause_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _try(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does work that is repeated; an error of it is logged once, until it succeeds again."""
        try:
            await work()
        except CoordinatorUnavailable as error:
            self._note(what, str(error), logging.WARNING)
        except (FreestepError, Damaged) as error:
            # It says itself what is to be done.
            self._note(what, str(error), logging.ERROR)
        except Exception as error:
            self._note(what, repr(error), logging.ERROR, error)
        else:
            if self._errors.pop(what, None) is not None:
                logger.info("run %s: %s is looked after again", self._context.name, what)

    def _note(self, what: str, text: str, level: int, error: Exception | None = None) -> None:
        is_known = text in self._errors.values()
        self._errors[what] = text
        if not is_known:
            logger.log(level, "run %s: %s: %s", self._context.name, what, text, exc_info=error)
