"""A secret that the services on one Redis share, by which they recognize each other's requests."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.store import Store, reachable

__all__ = ["SECRET_KEY", "SharedSecret"]

SECRET_KEY = "freestep:secret"
"""Holds the secret as text; it belongs to no run. The service that starts first sets it."""
_REFRESH_S = 5.0
_FRESH_S = 1.0
"""Seconds for which a secret that was just read is not read again: forged signatures cost Redis one call in them."""


class SharedSecret:
    """Signs messages to other services on the same Redis, and verifies theirs.

    The secret is read again every few seconds, and when a signature does not match, since a Redis that lost its data
    gets a new one. As an async context manager it is read at the beginning. Raises CoordinatorUnavailable there.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._secret = b""
        self._read_at = 0.0
        self._closing = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._read()
        self._refreshing = asyncio.create_task(self._refresh())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not cancelled: a command that is cut short leaves its connection behind.
        self._closing.set()
        if self._refreshing is not None:
            await self._refreshing

    def sign(self, message: bytes) -> str:
        """HMAC-SHA256 of a message, in hexadecimal."""
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    async def verify(self, message: bytes, signature: str) -> bool:
        """Whether the message was signed with the secret; while Redis is away, with the last one known."""
        if self._matches(message, signature):
            return True
        if self._clock() < self._read_at + _FRESH_S:
            return False
        with suppress(CoordinatorUnavailable):
            await self._read()
        return self._matches(message, signature)

    def _matches(self, message: bytes, signature: str) -> bool:
        return hmac.compare_digest(self.sign(message).encode(), signature.encode())

    async def _read(self) -> None:
        self._read_at = self._clock()
        with reachable():
            await self._store.client.set(SECRET_KEY, secrets.token_hex(32), nx=True)
            secret = await self._store.client.get(SECRET_KEY)
        if not secret:
            raise CoordinatorUnavailable(f"Redis does not keep {SECRET_KEY}")
        self._secret = secret.encode()

    async def _refresh(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await self._closing.wait()
                    return
            with suppress(CoordinatorUnavailable):
                await self._read()
