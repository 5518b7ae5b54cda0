"""What pushes wait for in a simulation: threads that do one thing after the other, lines that many share, places.

Each knows how long it was busy, in seconds of simulated time.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator
from math import inf
from typing import Any, cast

from simpy import Environment, Event, Resource

__all__ = ["Line", "SharedPlaces", "Steps", "Thread"]

Steps = Generator[Event, Any, Any]
"""What a simulated process waits for, in turn."""


class Thread:
    """Does one thing after the other, first come, first served.

    cores: of the machine that it shares with others; None where it has one of its own. wake: seconds that it takes more
    where it was idle.
    """

    def __init__(self, env: Environment, cores: Resource | None = None, wake: float = 0.0) -> None:
        self._env = env
        self._cores = cores
        self._wake = wake
        self._turn = None if cores is None else Resource(env)
        self._free_at = 0.0
        self.busy = 0.0
        self.woken = 0
        """How often it was idle before."""

    def use(self, seconds: float) -> Steps:
        """Waits for the thread and has it work for so long."""
        if self._turn is None:
            now = self._env.now
            seconds += self._woken(self._free_at < now)
            self._free_at = max(now, self._free_at) + seconds
            self.busy += seconds
            yield self._env.timeout(self._free_at - now)
            return
        assert self._cores is not None
        with self._turn.request() as turn:
            was_idle = turn.triggered and self._free_at < self._env.now
            yield turn
            with self._cores.request() as core:
                yield core
                seconds += self._woken(was_idle)
                self.busy += seconds
                yield self._env.timeout(seconds)
            self._free_at = self._env.now

    def _woken(self, was_idle: bool) -> float:
        self.woken += was_idle
        return self._wake if was_idle else 0.0


class Line:
    """A line whose rate all transfers share evenly, each up to the rate of its own line: processor sharing.

    All transfers have the same rate, so the one with the least left ends first, and what has passed of each is one
    number, `_passed`, for all.
    """

    def __init__(self, env: Environment, rate: float, own: float = inf) -> None:
        """rate, own: bytes a second, of the line and of each transfer's own."""
        self._env = env
        self._rate = rate
        self._own = own
        self._passed = 0.0
        self._since = 0.0
        self._ends: list[tuple[float, int, Event]] = []
        self._number = 0
        self._version = 0
        self.busy = 0.0
        """Seconds in which the line was full, counted in parts where it was in part."""

    def transfer(self, size: float) -> Event:
        """What happens when so many bytes have passed."""
        self.advance()
        event = self._env.event()
        self._number += 1
        heapq.heappush(self._ends, (self._passed + size, self._number, event))
        self._schedule()
        return event

    def _each(self) -> float:
        return min(self._own, self._rate / len(self._ends))

    def advance(self) -> None:
        """Counts what has passed until now."""
        now = self._env.now
        if self._ends:
            each = self._each()
            self._passed += each * (now - self._since)
            self.busy += (now - self._since) * each * len(self._ends) / self._rate
        self._since = now

    def _schedule(self) -> None:
        self._version += 1
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._passed) / self._each()
            timeout = self._env.timeout(left, self._version)
            assert timeout.callbacks is not None
            timeout.callbacks.append(self._end)

    def _end(self, timeout: Event) -> None:
        if timeout.value != self._version:
            # Another transfer has begun or ended since.
            return
        self.advance()
        first = self._ends[0][0]
        # What is left of rounding is less than a byte.
        while self._ends and self._ends[0][0] <= max(self._passed, first) + 1e-6:
            heapq.heappop(self._ends)[2].succeed()
        self._schedule()


class SharedPlaces:
    """Places for what many may read at once: who waits for one shares the next with all others that wait.

    As a service's points: the vector of a step is of all who are answered with it.
    """

    def __init__(self, env: Environment, capacity: int) -> None:
        self._env = env
        self._capacity = capacity
        self._readers: dict[int, int] = {}
        self._number = 0
        self._waiting: list[Event] = []
        self._since = 0.0
        self.busy = 0.0
        """Seconds, by the share of the places that was taken."""

    def take(self) -> Steps:
        """Waits for a place; returns its number, which `leave` is called with."""
        if len(self._readers) < self._capacity:
            return self._open(1)
        waiting = self._env.event()
        self._waiting.append(waiting)
        try:
            place: int = yield waiting
        except BaseException:
            # Its worker has died.
            if waiting.triggered:
                self.leave(cast("int", waiting.value))
            else:
                self._waiting.remove(waiting)
            raise
        return place

    def _open(self, readers: int) -> int:
        self.count()
        self._number += 1
        self._readers[self._number] = readers
        return self._number

    def leave(self, place: int) -> None:
        self._readers[place] -= 1
        if self._readers[place]:
            return
        self.count()
        del self._readers[place]
        if self._waiting:
            shared = self._open(len(self._waiting))
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.succeed(shared)

    def count(self) -> None:
        """Counts what was taken until now."""
        now = self._env.now
        self.busy += (now - self._since) * len(self._readers) / self._capacity
        self._since = now
