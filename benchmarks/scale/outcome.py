"""What a simulation has found."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """What became of the pushes. Rates and shares are of the time after the warm-up."""

    seconds: float = 0.0
    """Of simulated time after the warm-up."""
    sent: int = 0
    """Pushes that were begun; of them ..."""
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
    computed: int = 0
    """Gradients, those that no push came of included."""
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
    units_done: int = 0
    live: float = 0.0
    """Workers, the mean over time."""

    @property
    def goodput(self) -> float:
        """The share of the computed gradients that is in the weights."""
        counted = self.applied + self.accumulated - self.undone
        return counted / self.computed if self.computed else 0.0
