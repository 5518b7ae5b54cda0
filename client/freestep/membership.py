"""A worker's membership of a run: the run is created or found, its weights are uploaded, and a lease is held."""

from __future__ import annotations

import logging
from itertools import zip_longest

from freestep.answers import Pulled
from freestep.api.models import Lease, RunSpec
from freestep.errors import AlreadyInitialized, ManifestMismatch, RunExists
from freestep.flat import Flat
from freestep.lease import Claim, HeldLease
from freestep.run import Run
from freestep.worker_group import Batch, WorkerGroup

__all__ = ["Membership"]

logger = logging.getLogger("freestep")


class Membership:
    """One worker in one run. Its methods are collective: every rank calls them, and rank 0 sends the requests.

    held: on rank 0, holds the current lease; empty on others.
    """

    granted: Lease
    """The current lease; set by `take_lease`."""

    def __init__(self, run: Run, worker: str, worker_group: WorkerGroup, held: list[HeldLease]) -> None:
        self.worker = worker
        self._run = run
        self._worker_group = worker_group
        self._held = held

    def create(self, wanted: RunSpec) -> RunSpec:
        """Creates the run, or finds it; returns its spec. Raises ManifestMismatch if its parameters differ."""
        spec = self._worker_group.run_on_first(lambda: self._create_or_find(wanted))
        with self._worker_group.raise_on_all():
            if wanted.parameters != spec.parameters:
                pairs = zip_longest(wanted.parameters, spec.parameters)
                local, remote = next(pair for pair in pairs if pair[0] != pair[1])
                raise ManifestMismatch(
                    f"the parameters of the run {self._run.name!r} differ from the local ones: it has {remote} where "
                    f"the local parameter is {local}"
                )
        return spec

    def _create_or_find(self, wanted: RunSpec) -> RunSpec:
        try:
            return self._run.create(wanted).spec
        except RunExists:
            spec = self._run.status().spec
        # The number of shards can change at any time, so it is not compared.
        if spec.parameters == wanted.parameters and spec != wanted.model_copy(update={"shards": spec.shards}):
            logger.warning(
                "the run %s exists with another spec, which is used instead of the one given", self._run.name
            )
        return spec

    def initialize(self, weights: Flat) -> None:
        """Uploads the initial weights, unless another worker was first."""
        self._worker_group.run_on_first(lambda: self._upload(weights))

    def _upload(self, weights: Flat) -> None:
        try:
            self._run.initialize(weights)
        except AlreadyInitialized:
            logger.debug("another worker uploaded the weights of the run %s first", self._run.name)

    def take_lease(self) -> None:
        """Takes a lease, in place of the current one if there is one."""
        self.granted = self._worker_group.run_on_first(self._replace_lease)

    def _replace_lease(self) -> Lease:
        while self._held:
            self._held.pop().release()
        self._held.append(self._run.lease(self.worker))
        return self._held[0].granted

    def claim(self, taken_at: Pulled, batch: Batch) -> Claim:
        """A claim for one new push of a gradient that was computed at the y `taken_at`."""
        samples, loss, speed = batch.samples, batch.loss, batch.speed
        return self._worker_group.run_on_first(
            lambda: self._held[0].claim(taken_at.step, samples=samples, loss=loss, speed=speed)
        )

    def is_lost(self) -> bool:
        """True if the current lease is known to have ended."""
        return self._worker_group.run_on_first(lambda: self._held[0].lost is not None)
