"""A push in flight, from its claim to what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from freestep.api.models import AggregationSpec, Receipt
from freestep.client import Exchange, Pulled
from freestep.errors import ProblemError
from freestep.lease import Claim
from freestep.sharding import PASSING
from freestep.worker_group import Batch

__all__ = ["Flight", "refuse_late_gradients"]

_Answer: TypeAlias = tuple[Receipt, Pulled]

_AT_ONCE = ("sync", "quorum", "rennala")
"""Policies that drop a gradient which was not taken at the newest step, unless their max_staleness says otherwise."""


class Flight:
    """A push under one claim after the other, of a gradient that stays what it is.

    taken_at: where the gradient was taken. batch: what it is of.
    """

    def __init__(self, taken_at: Pulled, batch: Batch, claim: Claim) -> None:
        self.taken_at = taken_at
        self.batch = batch
        self.claim = claim
        self._begun: Exchange | None = None

    def begin(self, exchange: Exchange) -> None:
        """Takes note that it is on its way in the background, under its claim."""
        self._begun = exchange

    def answer(self, exchange: Callable[[], _Answer]) -> _Answer:
        """What the push was answered with, which is made now, by `exchange`, if it is not on its way."""
        return (self._begun.result if self._begun is not None else exchange)()

    def renew(self, claim: Claim) -> None:
        """Has another claim, since nothing was applied under the one before nor will be."""
        self.claim = claim
        self._begun = None

    def failed(self, error: Exception) -> bool:
        """Whether it has to be made again: what became of it is not known.

        Under the same claim, so that it counts once if it has arrived before.
        """
        self._begun = None
        return not isinstance(error, ProblemError) or isinstance(error, PASSING)

    def abandon(self) -> None:
        """Has it made no more."""
        if self._begun is not None:
            self._begun.abandon()


def refuse_late_gradients(aggregation: AggregationSpec) -> None:
    """Raises ValueError where a run drops gradients that were taken one step before."""
    most = aggregation.max_staleness
    if most == 0 or (most is None and aggregation.policy in _AT_ONCE):
        raise ValueError(
            f"with overlap=True gradients are a step late, and the run's policy, {aggregation.policy}, drops them: its "
            "max_staleness is 0"
        )
