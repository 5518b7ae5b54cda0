"""Keeps the storage of a service from services with another Redis, for as long as the service lives."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
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


class StorageClaims:
    """Claims places for the services of one Redis, by the Redis's identity, as an async context manager.

    Entering raises StorageInUse where live services with another Redis use one of the places, and
    CoordinatorUnavailable. Within, Redis is given its identity again when it has lost its data, and claims are renewed.
    """

    def __init__(
        self,
        store: Store,
        claims: Sequence[Claim],
        identity: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """identity: what the Redis is given if it has none; by default a new one."""
        self._store = store
        self._claims = claims
        # Of its own: claims are released when all else is closed.
        self._disk = Disk()
        self._identity = identity or ""
        self._clock = clock
        self._sleep = sleep
        self._renewed_at = 0.0
        self._strangers: dict[tuple[str, str], bytes] = {}
        """Who else was there at the last renewal, by place and name."""
        self._said: set[str] = set()
        self._closing = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._settle_identity()
        try:
            for claim in self._claims:
                await self._take(claim)
        except BaseException:
            await self._release()
            raise
        self._renewed_at = self._clock()
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

    async def _settle_identity(self) -> None:
        """Reads the identity of Redis, or gives it one, for which it waits a little where others may give it theirs."""
        found, until = await read_identity(self._store), self._clock() + _FORGOTTEN_S
        while found is None and not self._identity and self._clock() < until and await self._are_held():
            await self._sleep(_POLL_S)
            found = await read_identity(self._store)
        self._identity = found or await keep_identity(self._store, self._identity or new_identity())

    async def _are_held(self) -> bool:
        with suppress(StorageUnavailable):
            return any([await self._disk.run(claim.is_held) for claim in self._claims])
        return False

    async def _take(self, claim: Claim) -> None:
        seen: dict[str, bytes] = {}
        until = 0.0
        try:
            while strangers := await self._disk.run(claim.take, self._identity):
                if any(seen.get(name, content) != content for name, content in strangers.items()):
                    raise StorageInUse(claim.place)
                if strangers.keys() <= seen.keys():
                    if self._clock() >= until:
                        await self._disk.run(claim.dismiss, strangers)
                        continue
                else:
                    until = self._clock() + claim.patience_s
                    logger.warning(
                        "%s was used by a service with another Redis: waiting to see whether that is live", claim.place
                    )
                seen |= strangers
                await self._sleep(_POLL_S)
        except StorageUnavailable as error:
            # What can be read is served. The claim is made when it can be.
            logger.warning("that no service with another Redis uses %s is not made sure: %s", claim.place, error)

    async def beat(self) -> None:
        """Gives Redis its identity again if it has none, and renews the claims when it is time."""
        former = self._identity
        with suppress(CoordinatorUnavailable):
            self._identity = await keep_identity(self._store, former)
        if self._identity == former and self._clock() < self._renewed_at + _RENEWAL_S:
            return
        self._renewed_at = self._clock()
        there: dict[tuple[str, str], bytes] = {}
        for claim in self._claims:
            try:
                others = await self._disk.run(claim.renew, self._identity, former)
            except StorageInUse as error:
                self._say(claim, error)
            except StorageUnavailable as error:
                logger.debug("the claim on %s is not renewed: %s", claim.place, error)
            else:
                there |= {(claim.place, name): content for name, content in others.items()}
                if any(self._strangers.get(key, content) != content for key, content in there.items()):
                    self._say(claim, StorageInUse(claim.place))
        self._strangers = there

    def _say(self, claim: Claim, error: StorageInUse) -> None:
        if claim.place not in self._said:
            self._said.add(claim.place)
            logger.error("%s", error)

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
        for claim in self._claims:
            with suppress(StorageUnavailable):
                await self._disk.run(claim.release)
        self._disk.close()
