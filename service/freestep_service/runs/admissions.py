"""The admission of a push to one shard: what Redis decides by its claim, and the waits until it may go on.

The law of this file: it knows claims, and no bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from freestep.errors import Overloaded
from freestep_service.domain.records import Admission, Ahead, Claim, Pending, Record
from freestep_service.runs.context import RunContext
from freestep_service.runs.flight import Flight
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore

__all__ = ["SILENCE_S", "Admissions"]

SILENCE_S = 1.0
"""Seconds for which a message is listened for before Redis is asked for what it would say."""


class Admissions:
    """The admissions of one shard.

    take_sent: takes the tickets of the reads that the shard has sent and has not reported to Redis.
    """

    def __init__(
        self, context: RunContext, recovery: Recovery, core: ShardCore, take_sent: Callable[[], Sequence[str]]
    ) -> None:
        self._patience_s = context.settings.queue_seconds
        self._coordinator = context.coordinator.pushes
        self._receipts = context.receipts
        self._known = context.known_leases
        # Another process may have had the shard since.
        self._known.forget()
        self._events = context.events
        self._recovery = recovery
        self._core = core
        self._take_sent = take_sent
        self._moved = asyncio.Event()
        """Set, and replaced, when the slowest worker has moved on."""
        self._closed = False

    def expects(self, claim: Claim) -> bool:
        """Whether a claim is to be admitted by all that is known here, without a wait.

        A claim of units is not, since Redis alone knows who has which.
        """
        writer, policy = self._core.writer, self._core.shard.policy
        staleness = writer.applied_step - claim.step
        return (
            not claim.units
            and not policy.slack
            and claim.key not in self._receipts
            and self._known.has(claim, writer.epoch)
            and 0 <= staleness <= policy.staleness_bound(len(self._known))
        )

    def mistook(self) -> None:
        """A claim that was expected to be admitted was not, or Redis did not say: claims are looked at first again."""
        self._known.forget()

    async def admit(self, claim: Claim) -> Admission:
        """Raises what `RunPushes.admit` raises but for Ahead and Pending, and Overloaded."""
        deadline = asyncio.get_running_loop().time() + self._patience_s
        while True:
            moved, forgotten = self._moved, self._known.forgotten
            try:
                admission = await self._recovery.call(
                    lambda: self._coordinator.admit(claim, self._core.owner(), self._take_sent())
                )
            except Ahead:
                await self._wait_for_the_slowest(moved, deadline)
            except Pending:
                # Admitted before, but by no request that is still here: its answer or its body was lost.
                self._known.note(claim, self._core.writer.epoch, forgotten)
                return Admission()
            else:
                if admission.record is not None and not admission.replayed:
                    self._receipts.remember(claim.key, admission.record, admission.evicted)
                    self.tell_dropped(admission.record, claim)
                elif admission.record is None:
                    self._known.note(claim, self._core.writer.epoch, forgotten)
                return admission

    async def turn(self, flight: Flight, deadline: float) -> None:
        """Returns when the turn of a queued push has come. Raises Overloaded past the deadline, and as `admit`."""
        queued = True
        try:
            async with asyncio.timeout_at(deadline):
                while queued and not self._closed and not await _comes(flight.granted):
                    # It may have come unheard; or the run was opened anew, and there is no queue any more.
                    admission = await self.admit(flight.claim)
                    queued = admission.queued
                    if admission.record is None:
                        flight.admitted(admission.attempt)
        except TimeoutError:
            raise Overloaded from None

    def tell_dropped(self, record: Record, claim: Claim) -> None:
        """Tells of a push that was dropped without a place in the log; with several shards, its message does."""
        if not self._core.is_sharded:
            self._events.dropped(record, claim)

    def moved(self) -> None:
        """The slowest worker has moved on, or left: workers that wait for it may go on."""
        self._moved.set()
        self._moved = asyncio.Event()

    def close(self) -> None:
        """Nobody is waited for any more."""
        self._closed = True
        self.moved()

    async def _wait_for_the_slowest(self, moved: asyncio.Event, deadline: float) -> None:
        """Returns when it has moved, or may have unheard. Raises Overloaded past the deadline."""
        now = asyncio.get_running_loop().time()
        if self._closed or now >= deadline:
            raise Overloaded("the worker is too far ahead of the slowest one, and has waited for it")
        await _comes(moved, min(deadline - now, SILENCE_S))


async def _comes(event: asyncio.Event, seconds: float = SILENCE_S) -> bool:
    """Waits for an event, for at most that long; whether it has come."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
