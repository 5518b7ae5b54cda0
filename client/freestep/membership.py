"""A worker's membership of a run: the run is created or found, its weights are uploaded, and a lease is held."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from freestep.answers import Pulled
from freestep.api.models import Lease, RunSpec, RunStatus
from freestep.errors import AlreadyInitialized, ManifestMismatch, RunExists, RunNotFound
from freestep.flat import Flat
from freestep.lease import Claim, HeldLease
from freestep.own_name import OwnName
from freestep.run import Run
from freestep.worker_group import Batch, WorkerGroup

if TYPE_CHECKING:
    from freestep.local_run import LocalLease, LocalRun

__all__ = ["Membership"]

logger = logging.getLogger("freestep")


class Membership:
    """One worker in one run. Its methods are collective: every rank calls them, and rank 0 sends the requests.

    held: on rank 0, holds the current lease; empty on others.
    """

    granted: Lease
    """The current lease; set by `take_lease`."""

    def __init__(
        self, run: Run | LocalRun, worker: str, worker_group: WorkerGroup, held: list[HeldLease | LocalLease]
    ) -> None:
        self.worker = worker
        self._run = run
        self._worker_group = worker_group
        self._held = held
        self._name = OwnName["HeldLease | LocalLease"](
            run, "give each worker a name of its own (worker=, or FREESTEP_WORKER)"
        )

    def find(self) -> RunStatus | None:
        """The run as it is now; None if there is none."""
        return self._worker_group.run_on_first(self._find)

    def _find(self) -> RunStatus | None:
        with suppress(RunNotFound):
            return self._run.status()
        return None

    def create(self, wanted: RunSpec) -> RunStatus:
        """Creates the run; finds it if another worker has just created it, perhaps with other hyperparameters.

        Raises ManifestMismatch if it was created with other parameters.
        """
        return self._worker_group.run_on_first(lambda: self._create_or_find(wanted))

    def _create_or_find(self, wanted: RunSpec) -> RunStatus:
        try:
            return self._run.create(wanted)
        except RunExists:
            status = self._run.status()
        if [(each.name, each.shape) for each in status.spec.parameters] != [
            (each.name, each.shape) for each in wanted.parameters
        ]:
            raise ManifestMismatch(
                f"another worker has just created the run {self._run.name!r} with other parameters, or in another "
                "order: make the optimizer again"
            )
        return status

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

    def replace_lost_lease(self) -> None:
        """Takes a lease in place of one that the service has ended.

        Raises WorkerNameTaken where another process has taken a lease of this worker's name since.
        """
        self._worker_group.run_on_first(lambda: self._name.require(self.worker, self._own))
        self.take_lease()

    @property
    def _own(self) -> str | None:
        return self._held[0].granted.lease if self._held else None

    def take_name(self, worker: str) -> None:
        """Takes another name for the next lease, unless a worker lives under it."""
        if worker != self.worker and not self._worker_group.run_on_first(
            lambda: self._name.lives_elsewhere(worker, self._own)
        ):
            self.worker = worker

    def _replace_lease(self) -> Lease:
        # If it is refused one, the worker keeps the lease that it has, whose claims say why it cannot go on.
        lease = self._name.take_lease(self.worker)
        # First, since the wait for a release may be interrupted.
        self._held.insert(0, lease)
        self.granted = lease.granted
        while len(self._held) > 1:
            self._held.pop().release()
        return lease.granted

    def claim(self, taken_at: Pulled, batch: Batch, units: Mapping[str, Sequence[int]] | None = None) -> Claim:
        """A claim for one new push of a gradient that was computed at the y `taken_at`, and on these units of data."""
        samples, loss, speed = batch.samples, batch.loss, batch.speed
        return self._worker_group.run_on_first(
            lambda: self._held[0].claim(taken_at.step, samples=samples, loss=loss, speed=speed, units=units)
        )

    def leave(self) -> None:
        """Ends the current lease, so that nobody waits for this worker; the next claim under it is refused."""
        self._worker_group.run_on_first(lambda: self._held[0].release())

    def is_lost(self) -> bool:
        """True if the current lease is known to have ended."""
        return self._worker_group.run_on_first(lambda: self._held[0].lost is not None)
