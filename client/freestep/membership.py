"""A worker's place in a run: how it finds or creates the run, and its lease."""

from __future__ import annotations

import logging
from itertools import zip_longest

from freestep.api.models import Lease, RunSpec
from freestep.client import Pulled, Run
from freestep.errors import AlreadyInitialized, ManifestMismatch, RunExists
from freestep.flat import Flat
from freestep.lease import Claim, HeldLease
from freestep.worker_group import Batch, Ranks

__all__ = ["Membership"]

logger = logging.getLogger("freestep")


class Membership:
    """Every rank makes each call; rank 0 speaks with the service.

    held: where the lease is kept, by rank 0.
    """

    granted: Lease
    """What the newest lease is; there is none before `take_lease`."""

    def __init__(self, run: Run, worker: str, ranks: Ranks, held: list[HeldLease]) -> None:
        self.worker = worker
        self._run = run
        self._ranks = ranks
        self._held = held

    def create(self, wanted: RunSpec) -> RunSpec:
        """Creates the run, or finds it; returns its spec. Raises ManifestMismatch when its parameters are others."""
        spec = self._ranks.first(lambda: self._create_or_find(wanted))
        with self._ranks.together():
            if wanted.parameters != spec.parameters:
                pairs = zip_longest(wanted.parameters, spec.parameters)
                ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
                raise ManifestMismatch(f"the run {self._run.name!r} has other parameters: {theirs}, and here {ours}")
        return spec

    def _create_or_find(self, wanted: RunSpec) -> RunSpec:
        try:
            return self._run.create(wanted).spec
        except RunExists:
            spec = self._run.status().spec
        # Into how many shards it is cut is the run's own affair.
        if spec.parameters == wanted.parameters and spec != wanted.model_copy(update={"shards": spec.shards}):
            logger.warning(
                "the run %s exists with another spec, which is used instead of the one given", self._run.name
            )
        return spec

    def initialize(self, weights: Flat) -> None:
        """Gives the run its weights, unless another worker was first."""
        self._ranks.first(lambda: self._give(weights))

    def _give(self, weights: Flat) -> None:
        try:
            self._run.initialize(weights)
        except AlreadyInitialized:
            logger.debug("another worker gave the run %s its weights first", self._run.name)

    def take_lease(self) -> None:
        """Takes a lease instead of the one that is held, if one is."""
        self.granted = self._ranks.first(self._exchange_lease)

    def _exchange_lease(self) -> Lease:
        while self._held:
            self._held.pop().release()
        self._held.append(self._run.lease(self.worker))
        return self._held[0].granted

    def claim(self, taken_at: Pulled, batch: Batch) -> Claim:
        """A new push's claim."""
        samples, loss, speed = batch.samples, batch.loss, batch.speed
        return self._ranks.first(lambda: self._held[0].claim(taken_at.step, samples=samples, loss=loss, speed=speed))

    def is_lost(self) -> bool:
        """Whether the lease is known to be no longer good."""
        return self._ranks.first(lambda: self._held[0].lost is not None)
