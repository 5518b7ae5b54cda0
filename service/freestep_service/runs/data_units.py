"""The data sets of a run: which are added, who has their units, and who waits for some."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from freestep.api.data import Claimed, DataList, DataStatus, Returned
from freestep_service.coordination.data import HeldUnits
from freestep_service.domain.data_progress import units_of
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import Owner
from freestep_service.domain.run_view import RunView
from freestep_service.runs.context import RunContext
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.log_appends import LogAppends
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery

__all__ = ["DataUnits"]

_SILENCE_S = 1.0
"""Seconds for which a message is listened for before Redis is asked for what it would say."""


class DataUnits:
    """The data sets of one run, as the owner of a shard of it hands out their units."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        dispatch: Dispatch,
        appends: LogAppends,
    ) -> None:
        self._coordinator = context.coordinator.data
        self._telemetry = context.telemetry
        self._recovery = recovery
        self._shards = shards
        self._appends = appends
        self._moved = asyncio.Event()
        """Set, and replaced, when units were given back or the last has counted."""
        dispatch.on_units = self.moved

    async def create(self, new: NewDataSet) -> bool:
        """Adds a data set; whether it is new.

        Raises DataExists, MalformedRequest, RunNotInitialized, and as `LogAppends.append`.
        """

        async def ask(owner: Owner) -> tuple[None, dict[str, Any] | None]:
            return None, await self._coordinator.create(owner, new)

        return (await self._appends.append(ask))[1]

    async def claim(
        self, lease: str, token: int, name: str, count: int, *, key: str = "", wait: float = 0.0
    ) -> Claimed:
        """Hands out units to a lease; waits for at most `wait` seconds where all that is left is out with others.

        key: of the claim, which is given the same units if it comes again next; empty for none. Raises what
        `RunData.claim` raises, and ShardUnavailable.
        """

        async def ask() -> HeldUnits:
            owner = self._shards.require_any().core.owner()
            return await self._coordinator.claim(owner, lease, token, name, count, key)

        deadline = asyncio.get_running_loop().time() + wait
        while True:
            moved = self._moved
            held = await self._recovery.call(ask)
            left = deadline - asyncio.get_running_loop().time()
            if held.numbers or held.is_exhausted or left <= 0:
                return Claimed(units=units_of(held.spec, held.numbers), exhausted=held.is_exhausted)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _SILENCE_S)):
                    await moved.wait()

    async def give_back(
        self, lease: str, token: int, name: str, numbers: Sequence[int] = (), key: str = ""
    ) -> Returned:
        """Has units handed out again that a lease has: these numbers, or all of the data set.

        key: of the return, which is answered alike if it comes again next; empty for none.
        """
        return Returned(units=await self._coordinator.give_back(lease, token, name, numbers, key))

    async def status(self, name: str) -> DataStatus:
        """How a data set stands. Raises DataNotFound."""
        return (await self._coordinator.read(name)).status()

    async def all(self) -> DataList:
        """How the data sets stand, by name."""
        return DataList(data=[view.status() for view in await self._coordinator.read_all()])

    async def count(self, view: RunView | None) -> None:
        """Shows at /metrics how many units are open, out and done, where the run's first shard is here.

        view: the run as of the last heartbeat. Raises CoordinatorUnavailable.
        """
        has_any = view is not None and bool(view.run.get("datasets"))
        self._telemetry.counted(await self._coordinator.count() if has_any and self._shards.has_first else [])

    def moved(self) -> None:
        """Units were given back, or the last has counted: those who wait look again."""
        self._moved.set()
        self._moved = asyncio.Event()
