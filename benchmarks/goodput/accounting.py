"""What a run's entries and kills come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.goodput.kills import SERVICE, Kill
from benchmarks.goodput.ledger import APPLIED, COMPUTED, SEEDED, Entry

__all__ = ["Outcome", "account", "pushes_behind"]


@dataclass(frozen=True)
class Outcome:
    """One run of one job.

    computed: gradients. useful: those in the final weights. seconds: the run's length.
    after_worker, after_service: seconds from each SIGKILL to the first applied push whose gradient was computed after
    it, None where none came before the end.
    """

    job: str
    mean: float
    seconds: float
    computed: int
    useful: int
    after_worker: list[float | None]
    after_service: list[float | None]

    @property
    def share(self) -> float:
        return self.useful / self.computed if self.computed else 0.0


def account(
    job: str, mean: float, seconds: float, found: Sequence[Entry], kills: Sequence[Kill], final: int
) -> Outcome:
    """kills: as they were sent, by the clock of the entries. final: pushes in the final weights."""
    computed = sum(entry.kind == COMPUTED for entry in found)
    applied = sorted((entry.at, entry.computed) for entry in found if entry.kind == APPLIED)
    waits: dict[bool, list[float | None]] = {False: [], True: []}
    for kill in kills:
        first = next((at for at, computed in applied if computed > kill.at), None)
        waits[kill.victim == SERVICE].append(None if first is None else first - kill.at)
    return Outcome(job, mean, seconds, computed, final, waits[False], waits[True])


def pushes_behind(found: Sequence[Entry]) -> int:
    """The pushes in the weights that a run's steps are counted from: those that a worker brought with its weights."""
    return next((entry.step for entry in reversed(found) if entry.kind == SEEDED), 0)
