"""The service processes that share a Redis: who this one is, and how many there are."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from freestep_service.coordination.store import Store, reachable

__all__ = ["Node"]

_NODES_KEY = "freestep:nodes"
"""The live processes, see lua/node_heartbeat.lua; no run owns it."""


@dataclass
class Node:
    """This process. `id` is its own for as long as it lives; at `url` the others, and clients, reach it."""

    url: str
    ttl_ms: int
    """How long it keeps what it owns when nothing is heard of it."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    live_peers: int = 0
    """Other processes that are alive, or were until lately: they may be back soon, or Redis may have forgotten them."""
    _counted_at: float = 0.0
    _heard_at: float = 0.0

    async def heartbeat(self, store: Store) -> None:
        """Says that it lives, and counts who else does."""
        others = int(await store.run("node_heartbeat", [_NODES_KEY], self.id, self.ttl_ms)) - 1
        now, ttl = time.monotonic(), self.ttl_ms / 1000
        if now > self._heard_at + ttl:
            # Redis was away, for the others too: that it has not heard of them says nothing yet.
            self._counted_at = now
        self._heard_at = now
        if others >= self.live_peers or now > self._counted_at + ttl:
            self.live_peers, self._counted_at = others, now

    async def leave(self, store: Store) -> None:
        """Says that it goes."""
        with reachable():
            await store.client.zrem(_NODES_KEY, self.id)

    def share(self, shards: int) -> int:
        """How many of a run's shards fall to each process."""
        return -(-shards // (1 + self.live_peers))


class Stopwatch:
    """How long something has been so: since it was first noticed, in seconds."""

    def __init__(self) -> None:
        self._since: dict[object, float] = {}

    def note(self, things: set[object]) -> None:
        """These are so now, and all others are not."""
        now = time.monotonic()
        self._since = {thing: self._since.get(thing, now) for thing in things}

    def age(self, thing: object) -> float:
        since = self._since.get(thing)
        return 0.0 if since is None else time.monotonic() - since
