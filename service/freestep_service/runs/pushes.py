"""The way of a push through a shard: admit, stage, commit, apply.

admit (Redis: lease, token, epoch, key, staleness) decides what the claim can decide. stage receives the body into a
vector and checks it. commit (Redis), by the last shard to stage its part, is the policy's decision, the step and a
place in the log; the other shards hear of it. apply is each shard's, in the order of the log. Until a push is committed
it has changed nothing; once it is, it will be applied on all shards, whatever becomes of the requests that carried it.

The law of this file: memory has one owner. A staged vector is the flight's until the log's entry is heard, and the
entry's from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

from freestep.errors import (
    PROBLEMS,
    CoordinatorUnavailable,
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    MalformedTensors,
    NonFiniteGradient,
    Overloaded,
    ProblemError,
    ShardUnavailable,
)
from freestep_service.domain.aggregation import accepted_encodings
from freestep_service.domain.records import Admission, Ahead, Claim, Lost, Pending, Record, StagedPart
from freestep_service.runs.context import RunContext
from freestep_service.runs.flight import Decision, Flight
from freestep_service.runs.lanes import Lanes
from freestep_service.runs.phases import Phases
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.buffers import Vector
from freestep_service.state.push_entry import committed_push, largest_norm, require_usable
from freestep_service.state.staging import Body, Staged
from freestep_service.storage.journal import PartWriter

__all__ = ["PushOptions", "Pushes"]

_RETRY_S = 0.2
"""Seconds before Redis is asked again for a commit whose answer was lost."""
_SILENCE_S = 1.0
"""Seconds for which a message is listened for before Redis is asked for what it would say."""


@dataclass(frozen=True)
class PushOptions:
    """What a push's answer is to be: a point and dtype ("y F32"); of its group's update rather than its own entry."""

    wanted: str = ""
    after_update: bool = False


class Pushes:
    """The pushes of one shard.

    take_sent: takes the tickets of the reads that the shard has sent and has not reported to Redis.
    """

    def __init__(
        self, context: RunContext, recovery: Recovery, core: ShardCore, take_sent: Callable[[], Sequence[str]]
    ) -> None:
        self._settings = context.settings
        self._coordinator = context.coordinator.pushes
        self._receipts = context.receipts
        self._events = context.events
        self._telemetry = context.telemetry
        self._background = context.background
        self._recovery = recovery
        self._core = core
        self._take_sent = take_sent
        # With several shards, Redis gives the turns: pushes that took them here would wait for each other.
        self._lanes = Lanes(inf if core.is_sharded else max(1, core.staging.pool.capacity // 2))
        self._flights: dict[str, Flight] = {}
        self._moved = asyncio.Event()
        """Set, and replaced, when the slowest worker has moved on."""
        self._closed = False

    async def push(
        self, claim: Claim, body: Body, options: PushOptions = PushOptions(), phases: Phases | None = None
    ) -> tuple[Record, bool]:
        """The decision on a push, applied, and whether it had been decided before.

        phases: takes when it went from one to the next. Under durability `journal`, both are on disk by then.
        """
        self._require_sound()
        while (earlier := self._flights.get(claim.key)) is not None:
            if earlier.fingerprint != claim.fingerprint():
                raise IdempotencyConflict
            await self._landed(earlier)
        flight = self._flights[claim.key] = Flight(claim, phases)
        commit = None
        try:
            admission = await self._admit(claim)
            flight.phases.ended("admit")
            if admission.record is not None:
                return await self._answer(admission, admission.record, body)
            flight.staged = await self._stage(claim, flight, body, queued=admission.queued)
            commit = flight.commit = asyncio.create_task(self._commit(claim, flight, options))
            commit.add_done_callback(lambda commit: self._end(claim, flight, commit))
        finally:
            if commit is None:
                self._land(claim, flight)
        await asyncio.wait([commit], timeout=self._settings.commit_seconds)
        while flight.decided.done() and not commit.done() and not self._core.writer.is_waiting:
            # It will be applied: that takes as long as the updates before it, whatever Redis does.
            await asyncio.wait([commit], timeout=self._settings.commit_seconds)
        if commit.cancelled():
            raise ShardUnavailable("the shard is being given up")
        if commit.done():
            return commit.result(), False
        if flight.decided.done():
            raise ShardUnavailable("an update waits for what the other shards have of it")
        if self._core.is_sharded:
            raise ShardUnavailable("the push has not reached all shards yet")
        raise CoordinatorUnavailable("Redis has not answered whether the push is committed")

    async def settle(self, record: Record, wait: float) -> Record:
        """Waits, for at most `wait` seconds, until the update that an accumulated push is part of is applied."""
        writer = self._core.writer
        if record.decision != "accumulated" or wait <= 0:
            return record
        epoch = writer.epoch
        if await writer.reach(record.step + 1, wait):
            return record.settled(record.step + 1)
        if writer.epoch != epoch:
            raise EpochChanged(f"the run is in epoch {writer.epoch} now", epoch=writer.epoch)
        return record

    async def close(self) -> bool:
        """Cancels the commits that have no place in the log; whether there were none.

        Those that have one end when their entries are applied, or lost with the writer.
        """
        # A cancellation that meets a timeout of Redis's is lost.
        self._closed = True
        self.moved()
        for flight in self._flights.values():
            flight.granted.set()
        undecided = [
            flight.commit
            for flight in self._flights.values()
            if flight.commit is not None and not flight.commit.done() and not flight.decided.done()
        ]
        for task in undecided:
            task.cancel()
        await asyncio.gather(*undecided, return_exceptions=True)
        return not undecided

    # Messages

    def granted(self, key: str) -> None:
        """A push's turn has come."""
        if flight := self._flights.get(key):
            flight.granted.set()

    def moved(self) -> None:
        """The slowest worker has moved on, or left: workers that wait for it may go on."""
        self._moved.set()
        self._moved = asyncio.Event()

    def refused(self, key: str, slug: str, detail: str) -> None:
        """Another shard refused a push, or its lease has ended."""
        if flight := self._flights.get(key):
            flight.refuse(PROBLEMS[slug](detail or None))

    def dropped(self, key: str, record: Record) -> None:
        """A push was decided without a place in the log."""
        if flight := self._flights.get(key):
            flight.decide(record, None)

    def committed(
        self, key: str, record: Record, reads: Mapping[str, str], members: Mapping[str, Any] | None = None
    ) -> bool:
        """A push has a place in the log: gives its entry to the writer. False where its gradient is not here.

        members: the entry as Redis has it.
        """
        flight = self._flights.get(key)
        if flight is None or flight.staged is None:
            return False
        staged, flight.staged = flight.staged, None
        entry = committed_push(flight.claim, staged, record, reads, members)
        flight.decide(record, self._core.writer.submit(entry))
        return True

    # The way

    def _require_sound(self) -> None:
        """Raises ShardUnavailable: a receipt must not be given for what a failed update has lost."""
        if (failure := self._core.writer.failure) is not None:
            raise ShardUnavailable(f"an update failed and the run returns to its newest checkpoint: {failure}")

    async def _landed(self, flight: Flight) -> None:
        try:
            async with asyncio.timeout(self._settings.commit_seconds):
                await flight.landed.wait()
        except TimeoutError:
            raise CoordinatorUnavailable("the push is still on its way through another request") from None

    def _land(self, claim: Claim, flight: Flight) -> None:
        flight.give_back()
        del self._flights[claim.key]
        flight.landed.set()

    def _end(self, claim: Claim, flight: Flight, commit: asyncio.Task[Record]) -> None:
        self._land(claim, flight)
        if not commit.cancelled():
            # The request may have left.
            commit.exception()

    async def _admit(self, claim: Claim) -> Admission:
        deadline = asyncio.get_running_loop().time() + self._settings.queue_seconds
        while True:
            moved = self._moved
            try:
                admission = await self._recovery.call(
                    lambda: self._coordinator.admit(claim, self._core.owner(), self._take_sent())
                )
            except Ahead:
                await self._wait_for_the_slowest(moved, deadline)
            except Pending:
                # Admitted before, but by no request that is still here: its answer or its body was lost.
                return Admission()
            else:
                if admission.record is not None and not admission.replayed:
                    self._receipts.remember(claim.key, admission.record, admission.evicted)
                    self._tell_dropped(admission.record, claim)
                return admission

    async def _wait_for_the_slowest(self, moved: asyncio.Event, deadline: float) -> None:
        """Returns when it has moved, or may have unheard. Raises Overloaded past the deadline."""
        now = asyncio.get_running_loop().time()
        if self._closed or now >= deadline:
            raise Overloaded("the worker is too far ahead of the slowest one, and has waited for it")
        await _comes(moved, min(deadline - now, _SILENCE_S))

    async def _answer(self, admission: Admission, record: Record, body: Body) -> tuple[Record, bool]:
        # A push that was dropped on its claim alone has no digest, since its body was never read; and that of other
        # elements than this shard's cannot be compared.
        digest = record.digest_of(self._core.manifest.begin, self._core.manifest.end)
        if admission.replayed and digest and digest != await body.receive_digest():
            raise IdempotencyConflict("the idempotency key came before with another body")
        return record, admission.replayed

    async def _stage(self, claim: Claim, flight: Flight, body: Body, *, queued: bool) -> Staged:
        staging, staged, lanes = self._core.staging, None, self._lanes
        began = asyncio.get_running_loop().time()
        try:
            await lanes.enter(claim.lease, self._settings.queue_seconds)
            try:
                vector = None if queued else staging.pool.try_acquire()
                if vector is None:
                    vector = await self._turn(claim, flight, began, queued=queued)
                encodings = accepted_encodings(self._core.shard.spec.aggregation)
                copy = await self._journaled(claim, body, vector)
                flight.phases.ended("queue")
                staged = await staging.receive(body, vector, encodings, lambda: self._yield_slot(claim), copy)
            finally:
                lanes.leave(claim.lease)
            require_usable(self._core.shard.spec, staged.norm)
            flight.phases.ended("receive")
            return staged
        except BaseException as error:
            if staged is not None:
                staged.hold.release()
                self._forget_part(claim)
            with suppress(CoordinatorUnavailable):
                if isinstance(error, MalformedTensors | NonFiniteGradient):
                    await self._coordinator.discard(claim, self._core.index, error.slug, error.detail)
                else:
                    await self._coordinator.discard(claim, self._core.index)
            raise

    async def _journaled(self, claim: Claim, body: Body, vector: Vector) -> PartWriter | None:
        """Where a body is copied to while it comes. Raises StorageUnavailable, with the vector given back."""
        if (journal := self._core.journal) is None:
            return None
        try:
            return await journal.part(claim, body.length, self._settings.queue_seconds)
        except BaseException:
            self._core.staging.pool.release(vector)
            raise

    def _tell_dropped(self, record: Record, claim: Claim) -> None:
        """Tells of a push that was dropped without a place in the log; with several shards, its message does."""
        if not self._core.is_sharded:
            self._events.dropped(record, claim)

    def _forget_part(self, claim: Claim) -> None:
        """Forgets a push that has not counted."""
        if self._core.journal is not None:
            self._core.journal.forget(claim.key)

    def _yield_slot(self, claim: Claim) -> None:
        """The push's sender is slow, and its memory is counted apart: another push may have its slot."""
        self._background.spawn(self._coordinator.yield_slot(claim), "a slow push's slot was not given on")

    async def _turn(self, claim: Claim, flight: Flight, began: float, *, queued: bool) -> Vector:
        """Memory for a body that has waited since `began`, when its turn has come.

        Raises Overloaded, and what `_admit` raises.
        """
        loop = asyncio.get_running_loop()
        deadline = began + self._settings.queue_seconds
        try:
            async with asyncio.timeout_at(deadline):
                while queued and not await _comes(flight.granted):
                    # It may have come unheard; or the run was opened anew, and there is no queue any more.
                    queued = (await self._admit(claim)).queued
        except TimeoutError:
            raise Overloaded from None
        if self._closed:
            raise ShardUnavailable("the shard is being given up")
        return await self._core.staging.pool.acquire(max(deadline - loop.time(), 0.0))

    async def _commit(self, claim: Claim, flight: Flight, options: PushOptions) -> Record:
        """Commits and applies. Redis is asked until it answers: what it decided must not stay unknown."""
        record = None
        try:
            if self._core.journal is not None and self._core.is_sharded:
                # What the last part decides, the others have on disk.
                await self._core.journal.flush()
            decision = await self._decide(claim, flight, options)
            record = decision.record
            flight.phases.ended("commit")
            if decision.applied is not None:
                await asyncio.shield(decision.applied)
                flight.phases.ended("update")
            elif not record.seq:
                self._forget_part(claim)
                self._tell_dropped(record, claim)
            self._telemetry.passed(flight.phases)
            return record
        except Lost:
            self._forget(claim, record)
            detail = "the run was opened again before the push was applied"
            # A journal may have its entry: the same key tells.
            is_open = self._core.is_sharded or self._core.journal is not None
            raise ShardUnavailable(detail) if is_open else LeaseExpired(detail) from None
        except ShardUnavailable:
            self._forget(claim, record)
            raise
        except ProblemError:
            self._forget_part(claim)
            raise
        finally:
            flight.give_back()

    def _forget(self, claim: Claim, record: Record | None) -> None:
        """Forgets the receipt of an entry that is lost."""
        if record is not None and self._receipts.get(claim.key) is record:
            del self._receipts[claim.key]

    async def _decide(self, claim: Claim, flight: Flight, options: PushOptions) -> Decision:
        writer, staged = self._core.writer, flight.staged
        begin, end = self._core.manifest.begin, self._core.manifest.end
        assert staged is not None
        largest = largest_norm(self._core.shard.spec)
        while True:
            if self._closed:
                raise asyncio.CancelledError
            era = writer.era
            try:
                answer = await self._recovery.call(
                    lambda: self._coordinator.commit(
                        claim,
                        self._core.owner(),
                        StagedPart(begin, end, staged.digest, staged.norm or 0.0, staged.length),
                        largest,
                        options.wanted,
                        after_update=options.after_update,
                    )
                )
            except (CoordinatorUnavailable, ShardUnavailable):
                await asyncio.sleep(_RETRY_S)
                continue
            except Lost:
                # Where another shard refused the push meanwhile, that is on its way.
                if await self._hears(flight, _SILENCE_S):
                    return flight.decided.result()
                raise
            if answer is not None and not self._core.is_sharded:
                record, evicted = answer
                if era != writer.era:
                    raise Lost
                self._receipts.remember(claim.key, record, evicted)
                if not record.seq:
                    return Decision(record, None)
                self.committed(claim.key, record, {}, self._members(claim.key, record, evicted))
                return flight.decided.result()
            # The order of several shards' decisions, and the reads that go with them, are in the log.
            if await self._hears(flight, _SILENCE_S):
                return flight.decided.result()
            if answer is not None and not answer[0].seq:
                return Decision(answer[0], None)
            # Other shards may still commit it, so this part is kept, even without Redis.
            self._recovery.catch_up()

    @staticmethod
    async def _hears(flight: Flight, seconds: float) -> bool:
        """Waits for a message of the decision; whether it has come."""
        await asyncio.wait([flight.decided], timeout=seconds)
        return flight.decided.done()

    def _members(self, key: str, record: Record, evicted: Sequence[str]) -> Mapping[str, Any] | None:
        """The entry of a push, as Redis has it, for the journal."""
        if self._core.journal is None:
            return None
        return {
            "epoch": record.epoch,
            "seq": record.seq,
            "step": record.step,
            "advance": record.decision == "applied",
            "key": key,
            "record": record.to_json(),
            "evicted": list(evicted),
        }


async def _comes(event: asyncio.Event, seconds: float = _SILENCE_S) -> bool:
    """Waits for an event, for at most that long; whether it has come."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
