"""What processes tell each other through Redis's channels: heard at once, or not at all.

A message may be lost with its connection. Who listens is then called with None, and reads what it missed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from freestep_service.coordination.store import Store, reachable

__all__ = ["Channels", "Listener"]

logger = logging.getLogger("freestep")

Listener = Callable[[dict[str, Any] | None], None]

_EVERYBODY = "freestep:messages"
"""The channel of what concerns no run alone."""
_POLL_S = 1.0
_PAUSE_S = 0.2


class Channels:
    """One connection that listens to any number of channels."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._client = store.listener()
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        self._listeners: dict[str, Listener] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self, listener: Listener) -> None:
        """Begins, with what is told to everybody."""
        await self.subscribe(_EVERYBODY, listener)
        self._task = asyncio.create_task(self._hear())

    async def subscribe(self, channel: str, listener: Listener) -> None:
        if channel in self._listeners:
            return
        self._listeners[channel] = listener
        with reachable():
            await self._pubsub.subscribe(channel)

    async def unsubscribe(self, channel: str) -> None:
        if self._listeners.pop(channel, None) is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(channel)

    async def publish(self, message: dict[str, Any]) -> None:
        with reachable():
            await self._store.client.publish(_EVERYBODY, json.dumps(message))

    async def _hear(self) -> None:
        broken = False
        while not self._closed:
            try:
                message = await self._pubsub.get_message(timeout=_POLL_S)
                if broken:
                    broken = False
                    for listener in list(self._listeners.values()):
                        listener(None)
            except (RedisError, OSError):
                broken = True
                await asyncio.sleep(_PAUSE_S)
                continue
            if message is None:
                continue
            if (heard := self._listeners.get(message["channel"])) is not None:
                try:
                    heard(json.loads(message["data"]))
                except Exception:
                    logger.exception("a message could not be taken in: %s", message["data"][:500])

    async def close(self) -> None:
        # A cancellation that meets a timeout of the connection's is lost.
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        with suppress(RedisError, OSError):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]
            await self._client.aclose()
