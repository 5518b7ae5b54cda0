"""A run's leases, and the updates that go on when one ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from freestep.api.models import Lease, WorkerStatus
from freestep.errors import CoordinatorUnavailable, RunNotFound, ShardUnavailable
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.records import Behind, Ended, LogPosition, Lost, Receipts
from freestep_service.runs.telemetry import RunMetrics
from freestep_service.state.shard import Entry
from freestep_service.state.writer import Writer

__all__ = ["Leases"]

_LONGEST_LOOK_S = 0.5
"""Seconds between two looks, at the most: another process may grant a short lease and say nothing of it."""


class _Host(Protocol):
    """What the leases ask of their run."""

    @property
    def many(self) -> bool:
        """Whether the run has several shards, which hear of the ends of leases."""

    @property
    def writer(self) -> Writer | None:
        """That of a shard that is owned here, if there is one."""

    async def reopen(self) -> None:
        """Has the run opened again, because Redis has lost its data."""

    async def catch_up(self) -> None:
        """Reads what of the log was not heard."""


class Leases:
    """The leases of one run."""

    def __init__(
        self,
        coordinator: Coordinator,
        host: _Host,
        receipts: Receipts,
        metrics: RunMetrics,
        ttl_ms: int,
        patience_ms: int,
    ) -> None:
        self._coordinator = coordinator
        self._host = host
        self._receipts = receipts
        self._metrics = metrics
        self._ttl_ms = ttl_ms
        self._patience_ms = patience_ms
        self._may_be_live = True
        self._may_have_missed_a_closure = False
        self._next_look = 0.0
        """By the event loop's clock; before it no lease that is known of runs out."""

    async def grant(self, worker: str, ttl_ms: int | None) -> Lease:
        """Grants a lease, for the run's time to live unless another is given; the worker's older one is fenced off."""
        while True:
            try:
                lease, evicted = await self._coordinator.leases.grant(worker, ttl_ms or self._ttl_ms)
            except Behind:
                await self._host.reopen()
            else:
                self._receipts.forget(evicted)
                self._may_be_live = True
                self._next_look = 0.0
                return lease

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired and EpochChanged."""
        return await self._coordinator.leases.renew(lease)

    async def release(self, lease: str) -> None:
        """Ends a lease. Raises LeaseExpired."""
        while True:
            era = self._era
            try:
                self._ended(await self._coordinator.leases.release(lease, self._known), era)
                return
            except Behind:
                await self._host.reopen()
            except CoordinatorUnavailable:
                self._may_have_missed_a_closure = True
                raise

    def look_out(self) -> None:
        """Redis may have put an entry into the log of which it could not tell."""
        self._may_have_missed_a_closure = True

    async def workers(self) -> list[WorkerStatus]:
        """The live workers, by name."""
        return await self._coordinator.leases.workers()

    async def expire(self) -> None:
        """Ends the leases that have run out, and closes the update that waited for them alone."""
        writer = self._host.writer
        missed = self._may_have_missed_a_closure or (writer is not None and writer.has_gap)
        now = asyncio.get_running_loop().time()
        if not (missed or (self._may_be_live and now >= self._next_look)):
            return
        era = self._era
        try:
            if missed:
                await self._host.catch_up()
                self._may_have_missed_a_closure = False
            # Before the question, since a lease may be granted before the answer.
            self._may_be_live, self._next_look = False, now + _LONGEST_LOOK_S
            live, left_ms, ended = await self._coordinator.leases.expire(self._known, self._patience_ms)
            self._may_be_live |= live > 0 or self._host.many
            if live:
                self._next_look = min(self._next_look, now + left_ms / 1000)
            if ended:
                self._ended(ended, era)
            self._metrics.live(live)
        except Behind:
            self._may_be_live, self._next_look = True, 0.0
            with suppress(CoordinatorUnavailable, RunNotFound, ShardUnavailable):
                await self._host.reopen()
        except CoordinatorUnavailable:
            self._may_have_missed_a_closure = True

    @property
    def _known(self) -> LogPosition:
        return LogPosition(0, 0) if self._host.writer is None else self._host.writer.known

    @property
    def _era(self) -> int:
        return 0 if self._host.writer is None else self._host.writer.era

    def _ended(self, ended: Ended, era: int) -> None:
        writer = self._host.writer
        if era != self._era or writer is None:
            # Said by a Redis that has lost it since, or of no concern here.
            return
        self._receipts.forget(ended.evicted)
        if ended.seq and not self._host.many:
            with suppress(Lost):
                applied = writer.submit(Entry(ended.seq, ended.epoch, advance=True))
                applied.add_done_callback(lambda _: self._metrics.at(writer.epoch, writer.applied_step))
