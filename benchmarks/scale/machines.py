"""The machines of a simulated service, and what a push uses of them.

Shards are alike: each has the same part of every push, so one stands for all unless they share cores. Its line carries
a shard's bytes, and its loop a shard's requests; Redis and the workers' own lines carry what all shards do. On shared
cores a shard is a process, whose threads take turns: what it does in its loop and in its writer is of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import mean

from simpy import AllOf, Environment, Event, Resource

from benchmarks.scale.queues import Line, SharedPlaces, Steps, Thread
from benchmarks.scale.setup import Setup
from freestep_service.domain.aggregation import Policy
from freestep_service.state.memory_budget import snapshot_vectors
from freestep_service.state.staging import staging_vectors

__all__ = ["MOST_PIECES", "MOST_PUSH_POINTS", "PIECE_S", "Machines"]

PIECE_S, MOST_PIECES = 0.005, 8
"""A loop takes turns between bodies; what one of them takes of it is cut into a few pieces."""
MOST_PUSH_POINTS = 4
"""Points that may be sent at once of several shards, for the answers of pushes: as lua/_prelude.lua has it. A shard has
more, which are kept for pulls."""


class Machines:
    """The threads, lines and places of one setup."""

    def __init__(self, env: Environment, setup: Setup, policy: Policy) -> None:
        self._env = env
        self._setup = setup
        shared = None if setup.cores is None else Resource(env, capacity=setup.cores)
        costs, shards = setup.costs, setup.shards if shared is not None else 1
        self._loops = [Thread(env, shared, costs.loop_wake) for _ in range(shards)]
        self._writers = self._loops if shared is not None else [Thread(env) for _ in range(shards)]
        self.redis = Thread(env, shared, costs.redis_wake)
        self.sender = Thread(env, shared, costs.sender_wake)
        own = setup.link / setup.shards
        self._in, self._out = Line(env, setup.port, own), Line(env, setup.port, own)
        # Both are of one reserve, so each has half of it.
        more = setup.more_places // 2
        self.places = Resource(env, staging_vectors(policy, setup.shards) + more)
        """For bodies on their way."""
        self.place_s = 0.0
        """Seconds for which these were taken, summed over them."""
        self.points = SharedPlaces(env, min(snapshot_vectors(setup.shards), MOST_PUSH_POINTS) + more)
        """For points that are being sent."""

    def used(self) -> dict[str, float]:
        """Seconds for which each part was in use so far, by its share."""
        for line in (self._in, self._out):
            line.advance()
        self.points.count()
        return {
            "loop": mean(each.busy for each in self._loops),
            "writer": mean(each.busy for each in self._writers),
            "Redis": self.redis.busy,
            "sender": self.sender.busy,
            "line in": self._in.busy,
            "line out": self._out.busy,
            "places": self.place_s / self.places.capacity,
            "points": self.points.busy,
        }

    def woken(self) -> dict[str, float]:
        """How often threads were idle before they did something, all shards' loops together."""
        loops = sum(each.woken for each in self._loops)
        return {"loop": loops, "Redis": self.redis.woken, "sender": self.sender.woken}

    def loops(self, seconds: float) -> Steps:
        """Has all event loops work for so long."""
        yield from self._all(self._loops, seconds)

    def writers(self, per_parameter: float) -> Steps:
        """Has all writers pass over their parts."""
        yield from self._all(self._writers, per_parameter * self._setup.parameters / self._setup.shards)

    def receive(self, size: float) -> Steps:
        """A body of so many bytes comes in."""
        yield from self._body(self._in, size)

    def send(self, size: float) -> Steps:
        """... goes out."""
        yield from self._body(self._out, size)

    def _all(self, threads: Sequence[Thread], seconds: float) -> Steps:
        if not seconds:
            return
        if len(threads) == 1:
            yield from threads[0].use(seconds)
        else:
            yield AllOf(self._env, [self._env.process(each.use(seconds)) for each in threads])

    def _body(self, line: Line, size: float) -> Steps:
        """Over the line, and over the loops and the sender meanwhile."""
        setup, costs = self._setup, self._setup.costs
        part = size / setup.shards
        at_once: list[Event] = [line.transfer(part)] if min(setup.port, setup.link) < inf else []
        at_once += [self._env.process(self._in_pieces(loop, part * costs.loop_byte)) for loop in self._loops]
        if costs.sender_byte:
            at_once.append(self._env.process(self._in_pieces(self.sender, size * costs.sender_byte)))
        yield AllOf(self._env, at_once)

    @staticmethod
    def _in_pieces(thread: Thread, seconds: float) -> Steps:
        pieces = min(MOST_PIECES, max(1, round(seconds / PIECE_S)))
        for _ in range(pieces):
            yield from thread.use(seconds / pieces)
