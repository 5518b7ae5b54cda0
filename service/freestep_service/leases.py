"""A run's leases, and the updates that go on when one ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from freestep.errors import CoordinatorUnavailable, RunNotFound
from freestep.models import Lease, WorkerStatus
from freestep_service.coordinator import Coordinator
from freestep_service.metrics import RunMetrics
from freestep_service.pushes import Receipts
from freestep_service.records import Behind, Ended, Lost
from freestep_service.shard import Entry
from freestep_service.writer import Writer

__all__ = ["Leases"]


class Leases:
    """The leases of one run."""

    def __init__(
        self,
        coordinator: Coordinator,
        writer: Writer,
        receipts: Receipts,
        metrics: RunMetrics,
        ttl_ms: int,
        reopen: Callable[[], Awaitable[None]],
    ) -> None:
        self._coordinator = coordinator
        self._writer = writer
        self._receipts = receipts
        self._metrics = metrics
        self._ttl_ms = ttl_ms
        self._reopen = reopen
        self._may_be_live = True
        self._may_have_missed_a_closure = False

    async def grant(self, worker: str, ttl_ms: int | None) -> Lease:
        """Grants a lease, for the run's time to live unless another is given; the worker's older one is fenced off."""
        while True:
            try:
                lease, evicted = await self._coordinator.grant(worker, ttl_ms or self._ttl_ms)
            except Behind:
                await self._reopen()
            else:
                self._receipts.forget(evicted)
                self._may_be_live = True
                return lease

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired and EpochChanged."""
        return await self._coordinator.renew(lease)

    async def release(self, lease: str) -> None:
        """Ends a lease. Raises LeaseExpired."""
        while True:
            era = self._writer.era
            try:
                self._ended(await self._coordinator.release(lease, self._writer.known), era)
                return
            except Behind:
                await self._reopen()
            except CoordinatorUnavailable:
                self._may_have_missed_a_closure = True
                raise

    async def workers(self) -> list[WorkerStatus]:
        """The live workers, by name."""
        return await self._coordinator.workers()

    async def expire(self) -> None:
        """Ends the leases that have run out, and closes the update that waited for them alone."""
        missed = self._may_have_missed_a_closure or self._writer.has_gap
        if not (self._may_be_live or missed):
            return
        era = self._writer.era
        try:
            if missed:
                for closure in await self._coordinator.closures(self._writer.taken_seq):
                    self._ended(closure, era)
                self._may_have_missed_a_closure = False
            # Before the question, since a lease may be granted before the answer.
            self._may_be_live = False
            live, ended = await self._coordinator.expire(self._writer.known)
            self._may_be_live |= live > 0
            if ended:
                self._ended(ended, era)
            self._metrics.live(live)
        except Behind:
            self._may_be_live = True
            with suppress(CoordinatorUnavailable, RunNotFound):
                await self._reopen()
        except CoordinatorUnavailable:
            self._may_have_missed_a_closure = True

    def _ended(self, ended: Ended, era: int) -> None:
        if era != self._writer.era:
            # Said by a Redis that has lost it since.
            return
        self._receipts.forget(ended.evicted)
        if ended.seq:
            with suppress(Lost):
                applied = self._writer.submit(Entry(ended.seq, ended.epoch, advance=True))
                applied.add_done_callback(lambda _: self._metrics.at(self._writer.epoch, self._writer.applied_step))
