"""Keeps the storage of a service from services with another Redis, for as long as the service lives."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from freestep.errors import CoordinatorUnavailable, StorageUnavailable
from freestep_service.coordination.identity import keep_identity, read_identity
from freestep_service.coordination.store import Store
from freestep_service.runs.resources import Disk
from freestep_service.storage.claims import Claim, StorageInUse

__all__ = ["StorageClaims", "new_identity"]

logger = logging.getLogger("freestep")

_RENEWAL_S = 5.0
_POLL_S = 0.5
_FORGOTTEN_S = 3.0
"""Seconds for which a start waits for others to give a Redis that lost its data its identity: they do once a second."""
_BEAT_S = 1.0


def new_identity() -> str:
    """An identity that no Redis has."""
    return secrets.token_hex(16)


@dataclass
class _Place:
    """A claim on a place, and how it stands."""

    claim: Claim
    is_taken: bool = False
    is_lost: bool = False
    identity: str = ""
    """With which it was taken or renewed last."""
    renewed_at: float = 0.0
    strangers: dict[str, bytes] = field(default_factory=dict)
    """Who else was there when it was looked at last, by name."""
    until: float = 0.0
    """Until when strangers are watched before the place is taken from them."""
    problem: str | None = None

    def is_changed_by(self, strangers: Mapping[str, bytes]) -> bool:
        """Whether somebody who was there has changed since, and so is live."""
        return any(self.strangers.get(name, content) != content for name, content in strangers.items())


class StorageClaims:
    """Claims places for the services of one Redis, by the Redis's identity, as an async context manager.

    Entering raises StorageInUse where live services with another Redis use one of the places, and
    CoordinatorUnavailable. Within, Redis is given its identity again when it has lost its data, and claims are renewed.
    Where a place becomes another's all the same, `require` raises StorageUnavailable before anything is written: as
    long as the other is live, or for good where it has taken the place, as from a service that was stopped for a while.
    Then `on_lost` is called, once: what this service has of its runs is of no use to anybody any more.
    """

    def __init__(
        self,
        store: Store,
        claims: Sequence[Claim],
        identity: str | None = None,
        *,
        on_lost: Callable[[StorageInUse], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """identity: what the Redis is given if it has none; by default a new one."""
        self._store = store
        self._places = [_Place(claim) for claim in claims]
        # Of its own: claims are released when all else is closed.
        self._disk = Disk()
        self._identity = identity or ""
        self._on_lost = on_lost
        self._clock = clock
        self._sleep = sleep
        self._closing = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._settle_identity()
        try:
            for place in self._places:
                await self._take(place)
        except BaseException:
            await self._release()
            raise
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not cancelled: a command that is cut short leaves its connection behind.
        self._closing.set()
        if self._keeping is not None:
            await self._keeping
        await self._release()

    @property
    def problem(self) -> str | None:
        """Which places another service uses; None where none does."""
        return "; ".join(place.problem for place in self._places if place.problem) or None

    def require(self) -> None:
        """Raises StorageUnavailable unless all places are this service's. From any thread."""
        for place in self._places:
            if place.problem is not None:
                raise StorageUnavailable(place.problem)
            if not place.is_taken:
                raise StorageUnavailable(f"{place.claim.place} is not claimed yet")
            if self._clock() > place.renewed_at + place.claim.lapses_s:
                raise StorageUnavailable(f"the claim on {place.claim.place} was not renewed in time")

    async def _settle_identity(self) -> None:
        """Reads the identity of Redis, or gives it one, for which it waits a little where others may give it theirs."""
        found, until = await read_identity(self._store), self._clock() + _FORGOTTEN_S
        while found is None and not self._identity and self._clock() < until and await self._are_held():
            await self._sleep(_POLL_S)
            found = await read_identity(self._store)
        self._identity = found or await keep_identity(self._store, self._identity or new_identity())

    async def _are_held(self) -> bool:
        with suppress(StorageUnavailable):
            return any([await self._disk.run(place.claim.is_held) for place in self._places])
        return False

    # Taking

    async def _take(self, place: _Place) -> None:
        try:
            while not await self._try_to_take(place):
                await self._sleep(_POLL_S)
        except StorageUnavailable as error:
            # What can be read is served. The claim is made when it can be.
            logger.warning("that no service with another Redis uses %s is not made sure: %s", place.claim.place, error)

    async def _try_to_take(self, place: _Place) -> bool:
        """Takes a place unless somebody else is there; whether it is taken.

        Who has not changed for a while is removed, and does not prevent the next try. Raises StorageInUse where
        somebody is live.
        """
        claim, began = place.claim, self._clock()
        strangers = await self._disk.run(claim.take, self._identity)
        if place.is_changed_by(strangers):
            raise StorageInUse(claim.place)
        if not strangers:
            place.is_taken, place.identity, place.renewed_at, place.strangers = True, self._identity, began, {}
        elif not strangers.keys() <= place.strangers.keys():
            place.until = self._clock() + claim.patience_s
            place.strangers |= strangers
            logger.warning(
                "%s was used by a service with another Redis: waiting to see whether that is live", claim.place
            )
        elif self._clock() >= place.until:
            await self._disk.run(claim.dismiss, strangers)
        return place.is_taken

    # Keeping

    async def beat(self) -> None:
        """Gives Redis its identity again if it has none, and renews the claims when it is time."""
        is_known = False
        with suppress(CoordinatorUnavailable):
            self._identity = await keep_identity(self._store, self._identity)
            is_known = True
        for place in self._places:
            if place.is_lost:
                continue
            try:
                if not place.is_taken:
                    await self._try_to_take(place)
                elif self._identity != place.identity or self._clock() >= place.renewed_at + _RENEWAL_S:
                    await self._renew(place)
            except StorageInUse as error:
                # While Redis is away, that may have been given another identity, and the other shares it.
                if is_known:
                    self._lose(place, error)
            except StorageUnavailable as error:
                logger.debug("the claim on %s is not renewed: %s", place.claim.place, error)

    async def _renew(self, place: _Place) -> None:
        began = self._clock()
        strangers = await self._disk.run(place.claim.renew, self._identity, place.identity)
        place.identity, place.renewed_at = self._identity, began
        problem = str(StorageInUse(place.claim.place)) if place.is_changed_by(strangers) else None
        if problem and not place.problem:
            logger.error("%s; until then nothing is written there", problem)
        elif place.problem and not problem:
            logger.info("%s is used by this service's Redis alone again", place.claim.place)
        place.problem, place.strangers = problem, strangers

    def _lose(self, place: _Place, error: StorageInUse) -> None:
        place.is_lost, place.problem = True, str(error)
        logger.error("%s; nothing is written there any more", error)
        self._on_lost(error)

    async def _keep(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S):
                    await self._closing.wait()
                    return
            try:
                await self.beat()
            except Exception:
                logger.exception("the claims on storage are not renewed")

    async def _release(self) -> None:
        for place in self._places:
            with suppress(StorageUnavailable):
                await self._disk.run(place.claim.release)
        self._disk.close()
