"""A push from its claim until its outcome is known; with overlap, that is during the next batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Receipt
from freestep.errors import DtypeOverflow, ProblemError, StepNotReached
from freestep.lease import Claim
from freestep.sharding import TRANSIENT
from freestep.taken_units import TakenUnit
from freestep.tensor_transfer import Exchange
from freestep.worker_group import Batch

__all__ = ["InflightPush", "require_stale_gradients_accepted"]

_Answer: TypeAlias = tuple[Receipt, Pulled]

_NO_STALENESS = ("sync", "quorum", "rennala")
"""Policies whose max_staleness is 0 by default."""


class InflightPush:
    """A push of one gradient, which may need several claims until its outcome is known.

    taken_at: the y at which the gradient was computed. batch: the samples that it was computed from.
    units: the units of data among them.
    """

    def __init__(self, taken_at: Pulled, batch: Batch, claim: Claim, units: Sequence[TakenUnit] = ()) -> None:
        self.taken_at = taken_at
        self.batch = batch
        self.claim = claim
        self.units = units
        self._started: Exchange | None = None

    def start(self, exchange: Exchange) -> None:
        """Sets the exchange that sends the push in the background, under the current claim."""
        self._started = exchange

    def answer(self, exchange: Callable[[], _Answer]) -> _Answer:
        """Waits for the background exchange; if there is none, makes one with `exchange`."""
        return (self._started.result if self._started is not None else exchange)()

    def renew(self, claim: Claim) -> None:
        """Replaces the claim, once it is certain that the push was not and will not be applied under the old one."""
        self.claim = claim
        self._started = None

    def resend(self) -> None:
        """Makes the next `answer` send the push again under the same claim, by which it counts once."""
        self._started = None

    def is_unresolved(self, error: BaseException) -> bool:
        """True if, after this error, the push may have been applied: it has to be sent again to find out.

        After DtypeOverflow that would fail again: the gradient was not sent, or y is not to be had as F16.
        """
        if isinstance(error, DtypeOverflow):
            return False
        return not isinstance(error, ProblemError) or isinstance(error, (*TRANSIENT, StepNotReached))

    def abandon(self) -> None:
        """Stops retries of the background exchange."""
        if self._started is not None:
            self._started.abandon()


def require_stale_gradients_accepted(aggregation: AggregationSpec) -> None:
    """Raises ValueError if the policy drops every gradient that was computed one step ago."""
    most = aggregation.max_staleness
    if most == 0 or (most is None and aggregation.policy in _NO_STALENESS):
        raise ValueError(
            f"with overlap=True gradients are one step stale, but the run's policy {aggregation.policy!r} drops stale "
            "gradients: its max_staleness is 0. Create the run with max_staleness=1 or more, or use overlap=False"
        )
