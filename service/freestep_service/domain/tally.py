"""What is counted of a run's pushes: for its status alone, so that no update depends on it."""

from __future__ import annotations

from typing import NamedTuple

from freestep_service.domain.run_view import RunView

__all__ = ["DECISIONS", "NOTHING_COUNTED", "Tally"]

DECISIONS = ("applied", "accumulated", "dropped")


class Tally(NamedTuple):
    """How many pushes were decided which way; moving averages of their losses and staleness, None before the first."""

    applied: int = 0
    accumulated: int = 0
    dropped: int = 0
    loss: float | None = None
    staleness: float | None = None

    @classmethod
    def of(cls, view: RunView) -> Tally:
        """As Redis counts, and as the owner of the first shard has reported last."""
        applied, accumulated, dropped = map(view.number, DECISIONS)
        loss, staleness = view.field(0, "loss"), view.field(0, "staleness")
        return cls(
            applied,
            accumulated,
            dropped,
            None if loss is None else float(loss),
            None if staleness is None else float(staleness),
        )

    def counting(self, decision: str) -> Tally:
        """With one more push."""
        return self._replace(**{decision: self.pushes[decision] + 1})

    @property
    def pushes(self) -> dict[str, int]:
        """The counts by decision."""
        return {"applied": self.applied, "accumulated": self.accumulated, "dropped": self.dropped}


NOTHING_COUNTED = Tally()
