"""A run's leases, and the updates that go on when one ends."""

from __future__ import annotations

import asyncio
import logging

from freestep.api.models import Lease, WorkerStatus
from freestep.errors import CoordinatorUnavailable
from freestep_service.domain.records import Behind, Ended, LogPosition
from freestep_service.runs.context import RunContext
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery
from freestep_service.state.log import Entry

__all__ = ["Leases"]

logger = logging.getLogger("freestep")

_LONGEST_LOOK_S = 0.5
"""Seconds between two looks, at the most: another process may grant a short lease and send no message of it."""


class Leases:
    """The leases of one run."""

    def __init__(self, context: RunContext, recovery: Recovery, shards: OwnedShards) -> None:
        self._coordinator = context.coordinator.leases
        self._receipts = context.receipts
        self._known = context.known_leases
        self._telemetry = context.telemetry
        self._events = context.events
        self._history = context.history
        self._name = context.name
        self._ttl_ms = context.spec.lease_ttl_ms
        self._patience_ms = int(1000 * context.settings.stall_seconds)
        self._recovery = recovery
        self._shards = shards
        self._may_be_live = True
        self._next_look = 0.0
        """By the event loop's clock; before it no lease that is known of runs out."""

    @property
    def are_idle(self) -> bool:
        """Whether no lease is known to be live."""
        return not self._may_be_live

    async def grant(self, worker: str, ttl_ms: int | None) -> Lease:
        """Grants a lease, for the run's time to live unless another is given; the worker's older one is fenced off."""
        try:
            lease, evicted = await self._recovery.call(lambda: self._coordinator.grant(worker, ttl_ms or self._ttl_ms))
        finally:
            self._known.forget()
        self._receipts.forget(evicted)
        self._note("granted", worker, lease.step)
        if not self._shards.is_sharded:
            # With several shards, whoever grants it sends a message.
            self._events.lease("granted", worker)
        self._may_be_live = True
        self._next_look = 0.0
        return lease

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired and EpochChanged."""
        return await self._coordinator.renew(lease)

    async def release(self, lease: str) -> str:
        """Ends a lease; the name of its worker. Raises LeaseExpired."""

        async def release() -> tuple[str, Ended, int]:
            era = self._era
            worker, ended = await self._coordinator.release(lease, self._position)
            return worker, ended, era

        try:
            worker, ended, era = await self._recovery.call(release)
        except CoordinatorUnavailable:
            # The update that waited for it may be closed by an entry that Redis could not answer with.
            self._recovery.catch_up()
            raise
        finally:
            self._known.forget()
        self._note("released", worker)
        if not self._shards.is_sharded:
            self._events.lease("released", worker)
        self._on_ended(ended, era)
        return worker

    def _note(self, change: str, worker: str, step: int | None = None) -> None:
        self._telemetry.leased(change)
        fields = {"worker": worker, "change": change} | ({} if step is None else {"step": step})
        logger.info("run %s: the lease of worker %s is %s", self._name, worker, change, extra=fields)

    async def workers(self, holder_of: str | None = None) -> list[WorkerStatus]:
        """The live workers, by name. Their leases, with which anybody could push, are shown to their holders alone.

        holder_of: the lease of who asks.
        """
        hidden = {"lease": None, "token": None}
        return [
            worker if worker.lease == holder_of else worker.model_copy(update=hidden)
            for worker in await self._coordinator.workers()
        ]

    async def expire(self) -> None:
        """Ends the leases that have run out, and closes the update that waited for them alone.

        That is done by the owner of the run's first shard.
        """
        if not self._shards.has_first:
            # Whoever has it by now shows them.
            self._telemetry.live(None)
            return
        now = asyncio.get_running_loop().time()
        if not self._may_be_live or now < self._next_look:
            return
        era = self._era
        # Before the question, since a lease may be granted before the answer.
        self._may_be_live, self._next_look = False, now + _LONGEST_LOOK_S
        try:
            live, left_ms, ended = await self._coordinator.expire(self._position, self._patience_ms)
        except Behind:
            self._may_be_live, self._next_look = True, 0.0
            self._recovery.reopen("Redis has lost what its shards have seen")
        except CoordinatorUnavailable:
            self._may_be_live, self._next_look = True, 0.0
            self._recovery.catch_up()
        else:
            self._may_be_live |= live > 0 or self._shards.is_sharded
            if live:
                self._next_look = min(self._next_look, now + left_ms / 1000)
            if ended:
                self._known.forget()
                for worker in ended.workers:
                    self._events.lease("expired", worker)
                    self._note("expired", worker)
                self._on_ended(ended, era)
            self._telemetry.live(live)
            self._history.live(live)

    @property
    def _position(self) -> LogPosition:
        lowest = self._shards.lowest
        return LogPosition(0, 0) if lowest is None else lowest.core.writer.position

    @property
    def _era(self) -> int:
        lowest = self._shards.lowest
        return 0 if lowest is None else lowest.core.writer.era

    def _on_ended(self, ended: Ended, era: int) -> None:
        lowest = self._shards.lowest
        if era != self._era or lowest is None:
            # The answer of a Redis that has lost it since, or of no concern here.
            return
        self._receipts.forget(ended.evicted)
        if ended.seq and not self._shards.is_sharded:
            writer = lowest.core.writer
            members = {"epoch": ended.epoch, "seq": ended.seq, "step": ended.step, "advance": True}
            writer.submit(Entry(ended.seq, ended.epoch, advance=True, members=members))
