"""The rule by which the Helm chart has KEDA scale workers, over simulated time.

Wanted are as many workers as there are, times the room that the service has for more: the least of three ratios, each 1
where its target is met, within a half and twice. There are never more than units to do. What Kubernetes makes of that
(HorizontalPodAutoscaler, autoscaling/v2) is modelled: its tolerance, its windows of stabilization, its steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf

from benchmarks.scale.costs import STARTING_S
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.queues import Steps
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Setup
from benchmarks.scale.simulation import Simulation

__all__ = ["Hpa", "Look", "Observed", "Scaled", "Targets", "scaled", "wanted"]


@dataclass(frozen=True)
class Targets:
    """The chart's values of the same names."""

    busy: float = 0.6
    staleness: float = 16.0
    push_s: float = 2.0
    least: int = 1
    most: int = 256
    scale_in_s: float = 300.0


@dataclass(frozen=True)
class Observed:
    """Means over the last two minutes: seconds a second in which pushes were at their update, on the busiest shard; the
    staleness of pushes in steps; seconds of a push. None where nothing was pushed. units: open or out, None without a
    data set.
    """

    workers: int
    busy: float | None
    staleness: float | None
    push_s: float | None
    units: int | None


def wanted(observed: Observed, targets: Targets) -> int:
    """How many workers the rule asks for: the chart's query (templates/autoscaling.yaml), and the rounding of what it
    says."""
    rooms = [
        target / value
        for target, value in (
            (targets.busy, observed.busy),
            (targets.staleness, observed.staleness),
            (targets.push_s, observed.push_s),
        )
        if value
    ]
    room = min(max(min(rooms, default=1.0), 0.5), 2.0)
    asked = max(observed.workers * room, 1.0)
    if observed.units is not None:
        asked = min(asked, observed.units)
    # The controller rounds up, and leaves a number that is wrong by less than its tolerance.
    if observed.workers and abs(asked / observed.workers - 1) <= Hpa.TOLERANCE:
        return observed.workers
    return ceil(asked - 1e-9)


class Hpa:
    """What the controller makes of the numbers that are asked for; it looks every 15 seconds."""

    EVERY_S, TOLERANCE = 15.0, 0.1
    OUT_WINDOW_S, STEP_S, OUT_PERCENT, IN_PERCENT = 60.0, 60.0, 100, 50

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._asked: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def next(self, now: float, workers: int, asked: int) -> int:
        """How many workers there are to be."""
        self._asked.append((now, asked))
        longest = max(self.OUT_WINDOW_S, self._targets.scale_in_s)
        while self._asked[0][0] < now - longest:
            self._asked.popleft()
        least = min(number for at, number in self._asked if at >= now - self.OUT_WINDOW_S)
        most = max(number for at, number in self._asked if at >= now - self._targets.scale_in_s)
        aimed = workers
        if least > workers:
            aimed = least
        elif most < workers:
            aimed = most
        aimed = min(max(aimed, self._targets.least), self._targets.most)
        while self._changes and self._changes[0][0] <= now - self.STEP_S:
            self._changes.popleft()
        # Steps are of the number at the beginning of their period.
        grown = sum(change for _, change in self._changes if change > 0)
        shrunk = -sum(change for _, change in self._changes if change < 0)
        highest = ceil((workers - grown) * (1 + self.OUT_PERCENT / 100))
        lowest = int((workers + shrunk) * (1 - self.IN_PERCENT / 100))
        made = max(min(aimed, highest), min(lowest, workers), self._targets.least)
        if made != workers:
            self._changes.append((now, made - workers))
        return made


@dataclass(frozen=True)
class Look:
    """How a run stood when the controller looked."""

    at_s: float
    workers: int
    staleness: float
    push_s: float
    effective_per_s: float


@dataclass
class Scaled:
    """A run whose workers were scaled, or not. worker_s: seconds of workers that were paid for."""

    outcome: Outcome
    seconds: float = 0.0
    worker_s: float = 0.0
    looks: list[Look] = field(default_factory=list)


_RATE_S = 120.0


def scaled(setup: Setup, desk: Desk, seconds: float, targets: Targets | None = None) -> Scaled:
    """Simulates a run for so long, or until all its units have counted. targets: None for a fixed number of workers."""
    simulation = Simulation(setup, desk)
    found = Scaled(simulation.outcome)

    def controller() -> Steps:
        hpa = None if targets is None else Hpa(targets)
        marks = deque([(0.0, simulation.totals())])
        while True:
            yield simulation.env.timeout(Hpa.EVERY_S)
            now = simulation.env.now
            marks.append((now, simulation.totals()))
            while len(marks) > 2 and marks[1][0] <= now - _RATE_S:
                marks.popleft()
            (since, before), (_, after) = marks[0], marks[-1]
            past = {name: value - before.get(name, 0.0) for name, value in after.items()}
            pushes = past["served"]
            observed = Observed(
                simulation.live,
                past["in update"] / (now - since) if pushes else None,
                past["staleness"] / past["decided"] if pushes else None,
                past["in service"] / pushes if pushes else None,
                setup.units - simulation.rules.units_done() if setup.units else None,
            )
            found.looks.append(
                Look(
                    now,
                    simulation.live,
                    observed.staleness or 0.0,
                    observed.push_s or 0.0,
                    past["effective"] / (now - since),
                )
            )
            found.worker_s += simulation.live * Hpa.EVERY_S
            if hpa is not None and targets is not None:
                number = hpa.next(now, simulation.live, wanted(observed, targets))
                if number > simulation.live:
                    simulation.add(number - simulation.live, STARTING_S)
                else:
                    simulation.retire(simulation.live - number)

    simulation.env.process(controller())
    found.outcome = simulation.run(inf, until_s=seconds, is_over=lambda: 0 < setup.units == simulation.rules.counted)
    found.seconds = simulation.env.now
    return found
