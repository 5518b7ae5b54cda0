"""Messages between processes, over Redis's channels.

A message that is published while a process has no connection is lost to it. When its subscription holds again, its
listener is called with None, and reads what it may have missed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from freestep_service.coordination.store import Store, reachable

__all__ = ["Channels", "Listener"]

logger = logging.getLogger("freestep")

Listener = Callable[[dict[str, Any] | None], None]

_COMMON = "freestep:messages"
"""The channel of messages that concern no single run."""
_CONNECT_S = 5.0
_CONFIRM_S = 1.0
"""How long a subscriber waits for Redis to confirm its subscription before it goes on without."""
_PROBE_S = 5.0
"""How long a connection may be silent before it is probed, and again before it is given up."""
_PAUSE_S = 0.2


class Channels:
    """Subscriptions to any number of channels, over one connection that is made anew whenever it fails."""

    def __init__(self, store: Store, probe_s: float = _PROBE_S) -> None:
        self._store = store
        self._probe_s = probe_s
        self._listeners: dict[str, Listener] = {}
        self._confirmed: set[str] = set()
        """The channels that Redis has confirmed on the present connection."""
        self._awaited: dict[str, asyncio.Future[None]] = {}
        """Subscribers that wait for their confirmation."""
        self._reading: asyncio.Timeout | None = None
        """Around the present read; rescheduled to interrupt it when there is a channel to subscribe to."""
        self._is_failing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, listener: Listener) -> None:
        """Connects, and subscribes a listener to the channel that all processes share."""
        self._task = asyncio.create_task(self._run())
        await self.subscribe(_COMMON, listener)

    async def subscribe(self, channel: str, listener: Listener) -> None:
        """Has a listener called, on the event loop, with each message of a channel. A channel has one: the newest.

        Returns when the subscription holds. If that takes long it returns before; the subscription is then repeated in
        the background, and the listener called with None once it holds.
        """
        is_known = channel in self._listeners
        self._listeners[channel] = listener
        if is_known or channel in self._confirmed:
            return
        confirmed = self._awaited[channel] = asyncio.get_running_loop().create_future()
        self._interrupt()
        try:
            await asyncio.wait([confirmed], timeout=_CONFIRM_S)
        finally:
            self._awaited.pop(channel, None)

    async def unsubscribe(self, channel: str, listener: Listener) -> None:
        """Calls a listener no more. Another that has the channel by now keeps it."""
        if self._listeners.get(channel) == listener:
            del self._listeners[channel]
            self._interrupt()

    async def publish(self, message: dict[str, Any], channel: str = _COMMON) -> None:
        """Sends a message to all processes. Raises CoordinatorUnavailable."""
        with reachable():
            await self._store.client.publish(channel, json.dumps(message))

    def _interrupt(self) -> None:
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def _run(self) -> None:
        while True:
            client = self._store.listener()
            pubsub = client.pubsub()
            try:
                await self._receive(pubsub)
            except (RedisError, OSError) as error:
                if not self._is_failing:
                    logger.warning("messages of other processes are not received: %s", error)
                self._is_failing = True
            except Exception:
                logger.exception("messages of other processes are not received")
                self._is_failing = True
            finally:
                self._confirmed.clear()
                with suppress(RedisError, OSError):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
                with suppress(RedisError, OSError):
                    await client.aclose()
            await asyncio.sleep(_PAUSE_S)

    async def _receive(self, pubsub: PubSub) -> None:
        """Subscribes to the channels that have listeners, and passes messages on, until the connection fails."""
        subscribed: set[str] = set()
        is_probed = False
        while True:
            added, removed = self._listeners.keys() - subscribed, subscribed - self._listeners.keys()
            async with asyncio.timeout(_CONNECT_S):
                if added:
                    await pubsub.subscribe(*added)
                if removed:
                    self._confirmed -= removed
                    await pubsub.unsubscribe(*removed)
            subscribed = (subscribed | added) - removed
            if self._listeners.keys() != subscribed:
                continue
            try:
                async with asyncio.timeout(None) as self._reading:
                    message = await pubsub.get_message(timeout=self._probe_s)
            except TimeoutError:
                continue
            finally:
                self._reading = None
            if message is not None:
                is_probed = False
                self._take(message)
            elif is_probed:
                raise RedisConnectionError("Redis does not answer")
            else:
                is_probed = True
                await pubsub.ping()

    def _take(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        if message["type"] == "subscribe":
            self._confirm(channel)
        elif message["type"] == "message":
            self._call(channel, message["data"])

    def _confirm(self, channel: str) -> None:
        self._confirmed.add(channel)
        if self._is_failing and self._listeners.keys() <= self._confirmed:
            self._is_failing = False
            logger.info("messages of other processes are received again")
        if (awaited := self._awaited.pop(channel, None)) is not None:
            awaited.set_result(None)
        else:
            self._call(channel, None)

    def _call(self, channel: str, data: str | None) -> None:
        if (listener := self._listeners.get(channel)) is not None:
            try:
                listener(None if data is None else json.loads(data))
            except Exception:
                logger.exception("a message on %s could not be processed: %.500s", channel, data)

    async def close(self) -> None:
        while self._task is not None and not self._task.done():
            self._task.cancel()
            # Repeated, since Python 3.11 loses a cancellation that comes as a wait_for ends, such as one of redis's.
            await asyncio.wait([self._task], timeout=_PAUSE_S)
