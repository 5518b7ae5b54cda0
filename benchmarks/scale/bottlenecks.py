"""What a simulated run waits for first, and what helps against that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.scale.costs import RESERVE
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.setup import Setup

__all__ = ["REMEDIES", "Remedy", "bottleneck"]

_FULL, _COMPUTING = 0.85, 0.8
_SLOW_LINK, _MOST_WAITING = 125e6, 1000


def bottleneck(outcome: Outcome) -> str:
    """What limits a run.

    What is in use all the time does, the service's threads before the places that fill up behind them. Where nothing
    is, it is what the workers spend most of their time at.
    """
    use = outcome.use
    for name in ("Redis", "loop", "writer", "line in", "line out", "places", "points"):
        if use[name] >= _FULL:
            return {"line in": "port", "line out": "port", "loop": "event loop"}.get(name, name)
    if outcome.computing >= _COMPUTING:
        return "workers"
    waits = outcome.waits
    longest = max((name for name in waits if name not in ("all", "service")), key=lambda name: waits[name])
    return {"body in": "link", "body out": "link", "loop": "event loop", "place": "places", "point": "points"}.get(
        longest, longest
    )


@dataclass(frozen=True)
class Remedy:
    """Something to do about a bottleneck."""

    name: str
    against: Sequence[str]
    pushed_bytes: float | None = None
    pulled_bytes: float | None = None
    local_steps: int = 1
    more_shards: int = 1
    redis_share: float = 1.0
    as_slow_peers: bool = False
    """Whether `slow_bytes_per_second` is set above the workers' links, so that what they hold is of the reserve."""
    group: int = 1
    """Workers behind a service of their own, which is a worker of the run."""

    def applied_to(self, setup: Setup) -> Setup:
        """The setup with the remedy, but for `group`, which is more than one setup."""
        return replace(
            setup,
            pushed_bytes=self.pushed_bytes or setup.pushed_bytes,
            pulled_bytes=self.pulled_bytes or setup.pulled_bytes,
            local_steps=setup.local_steps * self.local_steps,
            shards=setup.shards * self.more_shards,
            more_places=self._more_places(setup),
            costs=replace(setup.costs, redis_push=setup.costs.redis_push * self.redis_share),
        )

    def _more_places(self, setup: Setup) -> int:
        if not self.as_slow_peers:
            return 0
        # A worker holds a body's memory, or a point's.
        return min(2 * setup.workers, int(RESERVE / (4 * setup.parameters / setup.shards)))

    def helps(self, name: str, setup: Setup) -> bool:
        """Whether it is something to do about a bottleneck of this name."""
        is_slow = setup.link <= _SLOW_LINK or not self.as_slow_peers
        # Of several shards, more who wait have Redis answer them alone.
        is_heard = setup.workers <= _MOST_WAITING or self.more_shards == 1
        return name in self.against and is_slow and is_heard and (self.group == 1 or setup.workers > self.group)


_BODIES = ("link", "places", "points", "port", "event loop")
REMEDIES = (
    Remedy("slow_bytes_per_second above the links", ("places", "points"), as_slow_peers=True),
    Remedy("int8 both ways", _BODIES, pushed_bytes=1 + 4 / 256, pulled_bytes=1 + 4 / 256),
    Remedy("4 times the shards", ("event loop", "port", "writer", "places", "points"), more_shards=4),
    Remedy("50 local steps", (*_BODIES, "Redis", "writer", "latency"), local_steps=50),
    Remedy("groups of 32, each with a service of its own, 50 steps", (*_BODIES, "Redis"), local_steps=50, group=32),
    Remedy("commits in batches of 8", ("Redis",), redis_share=1 / 8),
)
"""Commits in batches are not built. Redis Cluster is none of them: all keys of a run are on one of its nodes."""
