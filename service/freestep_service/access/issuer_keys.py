"""The public keys of an OpenID Connect issuer, kept up to date: RFC 7517.

They are read every few minutes, and when a token names a key that is not among them, which is how a new key is learnt
of at once. Such tokens cost nobody anything to make, so the keys are read at most once in some seconds, whoever asks.
While the issuer is away, the keys that were read last are as good as ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import jwt

from freestep.errors import IssuerUnavailable, Unauthenticated

__all__ = ["IssuerKeys", "Key"]

logger = logging.getLogger("freestep")

Key = Mapping[str, Any]
"""A JSON Web Key."""

_REFRESH_S = 300.0
"""Seconds after which the keys are read anew; a key that the issuer has withdrawn is good for no longer."""
_PAUSE_S = 10.0
"""Seconds between two readings, at least."""
_MOST_KEYS = 100
_MATERIAL = ("kty", "alg", "crv", "x", "y", "n", "e")
"""The members of a key that signatures are verified with."""


class IssuerKeys:
    """The keys of an issuer, by their IDs.

    read: reads the issuer's JSON Web Key Set; raises IssuerUnavailable. on_withdrawal: called when a key is gone, or
    another one has its ID. clock: seconds, from any origin.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[str, Any]]],
        on_withdrawal: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._on_withdrawal = on_withdrawal
        self._clock = clock
        self._keys: dict[str | None, Key] = {}
        self._has_failed = False
        """Whether the newest reading has. Why is in the log alone: who asks may be anybody."""
        self._began_at = -_PAUSE_S
        """When the newest reading began."""
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to read the keys. The issuer may be away: a service starts without it."""
        self._refreshing = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await self._refreshing

    async def find(self, key_id: str | None) -> Key:
        """The key of an ID; of None, the only key that there is.

        Raises Unauthenticated if the issuer has no such key, and IssuerUnavailable if that cannot be told now.
        """
        if (key := self._known(key_id)) is None:
            asked_at = self._clock()
            async with self._reading:
                key = self._known(key_id)
                if key is None and self._began_at <= asked_at:
                    await self._read_anew()
                    key = self._known(key_id)
        if key is None:
            if self._has_failed:
                raise IssuerUnavailable
            raise Unauthenticated("the issuer has no key that the token could be signed with")
        return key

    def have(self, key: Key) -> bool:
        """Whether a key that was found before is still published, under any ID."""
        return any(all(key.get(name) == each.get(name) for name in _MATERIAL) for each in self._keys.values())

    def _known(self, key_id: str | None) -> Key | None:
        if key_id is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(key_id)

    async def _read_anew(self) -> None:
        """Takes over the issuer's keys, under the lock. Raises IssuerUnavailable if they were read just before."""
        if self._clock() < self._began_at + _PAUSE_S:
            raise IssuerUnavailable(None if self._has_failed else "the issuer's keys were read a moment ago: ask again")
        self._began_at = self._clock()
        before = self._keys
        try:
            self._keys = _keys_of(await self._read())
        except IssuerUnavailable as error:
            if not self._has_failed:
                logger.warning("%s; the issuer's keys that are known go on", error)
            self._has_failed = True
            return
        self._has_failed = False
        if any(self._keys.get(key_id) != key for key_id, key in before.items()):
            self._on_withdrawal()

    async def _refresh(self) -> None:
        while True:
            try:
                async with self._reading:
                    await self._read_anew()
            except IssuerUnavailable:
                # A token has just had them read.
                pass
            except Exception:
                logger.exception("the issuer's keys could not be read anew")
            await asyncio.sleep(_PAUSE_S if self._has_failed else _REFRESH_S)


def _keys_of(document: Mapping[str, Any]) -> dict[str | None, Key]:
    """The keys of a set that signatures can be verified with, by their IDs. Raises IssuerUnavailable if it is none."""
    members = document.get("keys")
    if not isinstance(members, list):
        raise IssuerUnavailable("the issuer's keys are no JSON Web Key Set")
    found: dict[str | None, Key] = {}
    for member in members[:_MOST_KEYS]:
        # Keys that cannot be used here are left out: RFC 7517, section 5.
        with suppress(Exception):
            if member.get("use", "sig") == "sig" and member["kty"] != "oct":
                jwt.PyJWK(member)
                found[member.get("kid")] = member
    return found
