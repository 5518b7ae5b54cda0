"""The service processes that share a Redis: this process, and how many others are live."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from freestep_service.coordination.store import LAYOUT_KEY, Store, reachable
from freestep_service.domain.layout import LayoutInUse, NewerLayout
from freestep_service.domain.records import UrlInUse

__all__ = ["NODES_KEY", "NODE_HOSTS_KEY", "Node", "Stopwatch", "host_identity"]

logger = logging.getLogger("freestep")

NODES_KEY = "freestep:nodes"
"""The live processes, see lua/node_heartbeat.lua; the key belongs to no run."""
NODE_HOSTS_KEY = "{freestep:nodes}:hosts"
"""Their URLs and hosts. The hash tag keeps both keys on one server of a cluster."""
_POLL_S = 0.25
_SLOWEST_HEARTBEAT_S = 1.0
_WAITING = {
    "url": "%s was the URL of a service on the host %s until lately: waiting to see whether that is live",
    "layout": "%s was a service of an older version until lately: waiting to see whether that is live",
}


def host_identity() -> str:
    """The host's name and the id of its boot: different for two hosts, and for two containers, that share a name.

    A machine id would not do: copies of one image share it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"{uuid.getnode():012x}"
    return f"{socket.gethostname()} {boot}"


class _Rival(NamedTuple):
    """A live process that is in the way. `ends`: until when it counts as live, by Redis's clock.

    kind: `url`, on another host with the same URL, or `layout`, of an older layout. place: its host, or its URL.
    """

    kind: str
    id: str
    place: str
    ends: str


@dataclass
class Node:
    """This process. `id` is its own until it ends; at `url` the other processes, and clients, reach it."""

    url: str
    ttl_ms: int
    """How long others count it as live, and leave it its shards, after a heartbeat."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    host: str = field(default_factory=host_identity)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    newer: NewerLayout | None = None
    """Why this process is to write nothing any more: others have gone on with a newer layout."""
    live_peers: int = 0
    """Other processes that are live, or were until lately: they may come back, or Redis may have forgotten them."""
    _counted_at: float = 0.0
    _answered_at: float = 0.0
    _is_registered: bool = False
    _named: set[str] = field(default_factory=set)
    """The rivals that were logged."""

    async def heartbeat(self, store: Store) -> None:
        """Registers this process as live, and counts the others.

        The first heartbeat raises UrlInUse if a live process on another host has the same URL, and LayoutInUse if one
        is of an older layout; it takes up to `ttl_ms` to see whether such a process is still live. Later heartbeats log
        a rival for the URL. Raises NewerLayout where the processes on this Redis have a newer layout.
        """
        live, rival = await self._register(store) if self._is_registered else await self._join(store)
        if rival is not None and rival.id not in self._named:
            self._named.add(rival.id)
            logger.error("%s", self._refusal(rival))
        peers, now, ttl = live - 1, self.clock(), self.ttl_ms / 1000
        if now > self._answered_at + ttl:
            # Redis did not answer the others either, so it may count too few of them for now.
            self._counted_at = now
        self._answered_at = now
        if peers >= self.live_peers or now > self._counted_at + ttl:
            self.live_peers, self._counted_at = peers, now

    async def _join(self, store: Store) -> tuple[int, _Rival | None]:
        """Registers this process once no other is in its way. Raises UrlInUse or LayoutInUse if one is live."""
        seen: dict[str, str] = {}
        while True:
            live, rival = await self._register(store)
            if rival is None:
                self._is_registered = True
                return live, None
            if seen.get(rival.id, rival.ends) != rival.ends:
                raise self._refusal(rival)
            if rival.id not in seen:
                places = (self.url, _name(rival.place)) if rival.kind == "url" else (rival.place,)
                logger.warning(_WAITING[rival.kind], *places)
            seen[rival.id] = rival.ends
            await self.sleep(_POLL_S)

    async def _register(self, store: Store) -> tuple[int, _Rival | None]:
        arguments = (self.id, self.ttl_ms, self.url, self.host, int(self._is_registered))
        live, *rival = await store.run("node_heartbeat", [NODES_KEY, NODE_HOSTS_KEY, LAYOUT_KEY], *arguments)
        if rival[0] == "newer":
            newer = NewerLayout(int(rival[1]))
            if self.newer is None:
                logger.error("%s", newer)
            self.newer = newer
            raise newer
        return int(live), _Rival(*map(str, rival)) if rival[0] else None

    def _refusal(self, rival: _Rival) -> UrlInUse | LayoutInUse:
        if rival.kind == "layout":
            return LayoutInUse(rival.place)
        return UrlInUse(self.url, self._name, _name(rival.place))

    async def leave(self, store: Store) -> None:
        """Ends the registration, so that others need not wait until it runs out."""
        with reachable():
            await store.client.zrem(NODES_KEY, self.id)

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats of a process."""
        return min(_SLOWEST_HEARTBEAT_S, self.ttl_ms / 4000)

    def share(self, shards: int) -> int:
        """How many of a run's shards fall to each process."""
        return -(-shards // (1 + self.live_peers))

    @property
    def _name(self) -> str:
        return _name(self.host)


def _name(host: str) -> str:
    return host.split()[0]


class Stopwatch:
    """For how long each of several things has been the case, in seconds since it was first noted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[object, float] = {}

    def note(self, things: set[object]) -> None:
        """Notes what is the case now; everything else is not."""
        now = self._clock()
        self._since = {thing: self._since.get(thing, now) for thing in things}

    def age(self, thing: object) -> float:
        """Seconds since `thing` was first noted, 0 if it is not the case."""
        since = self._since.get(thing)
        return 0.0 if since is None else self._clock() - since
