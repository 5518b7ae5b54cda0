"""What a simulation has found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """What became of the pushes. Rates and shares are of the time after the warm-up."""

    seconds: float = 0.0
    """Of simulated time after the warm-up."""
    sent: int = 0
    """Pushes that were begun, each of gradients that were computed; of them ..."""
    applied: int = 0
    accumulated: int = 0
    dropped: int = 0
    lost: int = 0
    """whose worker died, or whose epoch ended, before they were decided;"""
    under_way: int = 0
    """and those that were neither when the simulation ended."""
    died: int = 0
    """How often a worker died."""
    crashes: int = 0
    """How often a shard did."""
    undone: int = 0
    """Pushes that had counted, and were taken back with a crash."""
    pushes_per_s: float = 0.0
    """Pushes that were decided, a second."""
    effective_per_s: float = 0.0
    """Gradients that counted, each by what damping left of it, a second; undone ones are taken off."""
    staleness: float = 0.0
    """The mean of pushes that were decided, in steps."""
    expected_staleness: float = 0.0
    """What the run's delay correction expects in the end."""
    computing: float = 0.0
    """The share of the workers' time in which they computed."""
    use: dict[str, float] = field(default_factory=dict)
    """Utilisation by what is used, from 0 to 1."""
    waits: dict[str, float] = field(default_factory=dict)
    """Seconds of a push by what it was at, the mean."""
    woken: Counter[str] = field(default_factory=Counter)
    """How often a push has woken the loops, Redis and the thread that sends, the mean."""
    waiting: float = 0.0
    """Others that waited for a place when a push was decided, the mean."""
    units_done: int = 0

    def take(self, past: Counter[str]) -> None:
        """Takes the rates and the shares from what passed of `Simulation.totals` after the warm-up."""
        seconds, decided = max(past["now"], 1e-12), max(past["decided"], 1)
        finished = max(past["finished"], 1)

        def named(kind: str, by: float) -> dict[str, float]:
            return {
                name.removeprefix(kind): value / by for name, value in sorted(past.items()) if name.startswith(kind)
            }

        self.seconds = seconds
        self.pushes_per_s = past["decided"] / seconds
        self.effective_per_s = past["effective"] / seconds
        self.staleness = past["staleness"] / decided
        self.computing = past["computing"] / max(past["live"], 1e-12)
        self.use = named("use ", seconds)
        self.waiting = past["waiting"] / decided
        self.woken = Counter(named("woken ", decided))
        self.waits = named("in ", finished)

    @property
    def goodput(self) -> float:
        """The share of the computed gradients that is in the weights."""
        counted = self.applied + self.accumulated - self.undone
        return counted / self.sent if self.sent else 0.0
