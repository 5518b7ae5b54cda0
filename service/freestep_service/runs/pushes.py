"""The way of a push through a shard: admit, stage, commit, apply.

admit (Redis: lease, token, epoch, key, staleness) decides what the claim can decide. stage receives the body into a
vector and checks it. commit (Redis), by the last shard to stage its part, is the policy's decision, the step and a
place in the log; the other shards hear of it. A small body of a run of one shard, whose claim is expected to be
admitted, is staged first, and admitted with its commit. apply is each shard's, in the order of the log. Until a push is
committed it has changed nothing; once it is, it will be applied on all shards, whatever becomes of the requests that
carried it.

The law of this file: memory has one owner. A staged vector is the flight's until the log's entry is heard, and the
entry's from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
    StorageUnavailable,
)
from freestep_service.domain.records import Ahead, Claim, Lost, Record, StagedPart
from freestep_service.runs.admissions import SILENCE_S, Admissions
from freestep_service.runs.context import RunContext
from freestep_service.runs.flight import Decision, Flight
from freestep_service.runs.intake import Intake, Room
from freestep_service.runs.phases import Phases
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.push_entry import committed_push, largest_norm
from freestep_service.state.staging import Body, Staged

__all__ = ["PushOptions", "Pushes"]

_RETRY_S = 0.2
"""Seconds before Redis is asked again for a commit whose answer was lost."""
_SOON_S = 1.0
"""Seconds for which a push waits for its turn and memory before its claim is looked at, which renews its lease."""


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
        self._telemetry = context.telemetry
        self._background = context.background
        self._recovery = recovery
        self._core = core
        self._admissions = Admissions(context, recovery, core, take_sent)
        self._intake = Intake(core)
        self._flights: dict[str, Flight] = {}
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
            room = await self._room_first(claim, flight, body)
            refusal = None if room is None else await self._receive_first(flight, body, room)
            if room is None or refusal is not None:
                # What the claim decides comes before what the body is refused for.
                admission = await self._admissions.admit(claim)
                flight.phases.ended("admit")
                if (record := admission.record) is not None:
                    if admission.replayed and self._digest(record) is not None:
                        # A body that is refused is another one than that which counted.
                        self._require_same(record, "" if refusal is not None else await body.receive_digest())
                    return record, admission.replayed
                flight.admitted(admission.attempt)
                if refusal is not None:
                    await self._discard(flight, refusal)
                    raise refusal
                flight.staged = await self._stage(flight, body, queued=admission.queued)
            commit = flight.commit = asyncio.create_task(self._commit(claim, flight, options))
            commit.add_done_callback(lambda commit: self._end(flight, commit))
        finally:
            if commit is None:
                self._land(flight)
        await asyncio.wait([commit], timeout=self._settings.commit_seconds)
        while flight.decided.done() and not commit.done() and not self._core.writer.is_waiting:
            # It will be applied: that takes as long as the updates before it, whatever Redis does.
            await asyncio.wait([commit], timeout=self._settings.commit_seconds)
        if commit.cancelled():
            raise ShardUnavailable("the shard is being given up")
        if commit.done():
            decision = commit.result()
            return decision.record, decision.replayed
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
        self._admissions.close()
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

    def granted(self, key: str, attempt: str | None) -> None:
        """A push's turn has come."""
        if flight := self._flights.get(key):
            flight.hear(attempt, flight.granted.set)

    def moved(self) -> None:
        """The slowest worker has moved on, or left: workers that wait for it may go on."""
        self._admissions.moved()

    def refused(self, key: str, attempt: str | None, slug: str, detail: str) -> None:
        """Another shard refused a push, or its lease has ended."""
        if flight := self._flights.get(key):
            flight.hear(attempt, partial(flight.refuse, PROBLEMS[slug](detail or None)))

    def dropped(self, key: str, attempt: str | None, record: Record) -> None:
        """A push was decided without a place in the log."""
        if flight := self._flights.get(key):
            flight.hear(attempt, partial(flight.decide, record, None))

    def asked(self, key: str, attempt: str, claim: str) -> None:
        """Redis asks about a part that has been arriving for long: one that no request carries is discarded.

        The answer to its admission was lost, or that to its being discarded.
        """
        if key not in self._flights:
            flight = self._flights[key] = Flight(Claim("", 0, 0, key))
            flight.fingerprint, flight.attempt = claim, attempt
            self._background.spawn(self._withdraw(flight), "a part of a push that nobody sends was not discarded")

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

    def _land(self, flight: Flight) -> None:
        flight.give_back()
        del self._flights[flight.claim.key]
        flight.landed.set()

    def _end(self, flight: Flight, commit: asyncio.Task[Decision]) -> None:
        self._land(flight)
        if not commit.cancelled():
            # The request may have left.
            commit.exception()

    def _comes_first(self, claim: Claim) -> bool:
        """Whether a body is received before its claim is looked at, so that Redis is called once for both.

        That is for small bodies of claims that are expected to be admitted.
        """
        return not self._core.is_sharded and self._core.staging.is_inline and self._admissions.expects(claim)

    async def _room_first(self, claim: Claim, flight: Flight, body: Body) -> Room | None:
        """Room for a body that comes first.

        None where there is none soon: what a push is refused for then comes behind what its claim is refused for.
        """
        if not self._comes_first(claim):
            return None
        generation, room = self._core.loaded, None
        deadline = asyncio.get_running_loop().time() + min(_SOON_S, self._settings.queue_seconds)
        with suppress(Overloaded, StorageUnavailable):
            room = await self._intake.room(claim, body.length, deadline)
            if self._comes_first(claim) and generation == self._core.loaded:
                flight.came_in = generation
            else:
                # Things have changed meanwhile.
                room.give_back()
                room = None
        flight.phases.ended("queue")
        return room

    async def _receive_first(self, flight: Flight, body: Body, room: Room) -> ProblemError | None:
        """Receives a body; returns what the tensors are refused for, if they are."""
        refusal = None
        try:
            flight.staged = await room.receive(body)
        except (MalformedTensors, NonFiniteGradient) as error:
            refusal, flight.came_in = error, None
        flight.phases.ended("receive")
        return refusal

    def _digest(self, record: Record) -> str | None:
        """That of this shard's part of a push that was decided.

        None for one that was dropped on its claim alone, since its body was never read, and for one of other elements,
        which cannot be compared.
        """
        return record.digest_of(self._core.manifest.begin, self._core.manifest.end)

    def _require_same(self, record: Record, digest: str) -> None:
        """Raises IdempotencyConflict where a push that was decided before has come with another body."""
        if self._digest(record) not in (None, digest):
            raise IdempotencyConflict("the idempotency key came before with another body")

    async def _stage(self, flight: Flight, body: Body, *, queued: bool) -> Staged:
        deadline = asyncio.get_running_loop().time() + self._settings.queue_seconds

        async def turn() -> None:
            await self._admissions.turn(flight, deadline)
            if self._closed:
                raise ShardUnavailable("the shard is being given up")

        try:
            room = await self._intake.room(flight.claim, body.length, deadline, turn if queued else None)
            flight.phases.ended("queue")
            staged = await room.receive(body, lambda: self._yield_slot(flight))
            flight.phases.ended("receive")
            return staged
        except BaseException as error:
            await self._discard(flight, error)
            raise

    async def _discard(self, flight: Flight, error: BaseException) -> None:
        """Has Redis forget an admitted push whose body has not come, or was refused.

        Raises CoordinatorUnavailable in place of a refusal that Redis may not know of: who is told of one takes the
        push's units to be open again.
        """
        call = (flight.claim, flight.attempt, self._core.index)
        if isinstance(error, MalformedTensors | NonFiniteGradient):
            await self._coordinator.discard(*call, error.slug, error.detail)
            return
        with suppress(CoordinatorUnavailable):
            await self._coordinator.discard(*call)

    async def _withdraw(self, flight: Flight) -> None:
        """Discards a part that no request carries; one that sends its key again waits until Redis has answered."""
        try:
            await self._coordinator.discard(flight.claim, flight.attempt, self._core.index)
        finally:
            self._land(flight)

    def _yield_slot(self, flight: Flight) -> None:
        """The push's sender is slow, and its memory is counted apart: another push may have its slot."""
        yielding = self._coordinator.yield_slot(flight.claim, flight.attempt)
        self._background.spawn(yielding, "a slow push's slot was not given on")

    async def _commit(self, claim: Claim, flight: Flight, options: PushOptions) -> Decision:
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
            else:
                self._intake.forget(claim)
                if not decision.replayed:
                    self._admissions.tell_dropped(record, claim)
            self._telemetry.passed(flight.phases)
            return decision
        except Lost as lost:
            self._forget(claim, record)
            if lost.place is not None:
                self._intake.give_up(claim, lost.place)
            detail = "the run was opened again before the push was applied"
            # A journal may have its entry: the same key tells.
            is_open = self._core.is_sharded or self._core.journal is not None
            raise ShardUnavailable(detail) if is_open else LeaseExpired(detail) from None
        except ShardUnavailable:
            self._forget(claim, record)
            raise
        except ProblemError:
            self._intake.forget(claim)
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
        part = StagedPart(begin, end, staged.digest, staged.norm or 0.0, staged.length)
        may_be_decided = flight.came_in is None
        while True:
            if flight.decided.done():
                # Its entry came by the log, while Redis was asked in vain.
                return flight.decided.result()
            if self._closed:
                raise asyncio.CancelledError
            era = writer.era
            try:
                answer = await self._recovery.call(partial(self._ask, claim, flight, part, options))
            except ShardUnavailable:
                if not may_be_decided:
                    self._intake.forget(claim)
                    raise
                await asyncio.sleep(_RETRY_S)
                continue
            except CoordinatorUnavailable:
                may_be_decided = True
                await asyncio.sleep(_RETRY_S)
                continue
            except Ahead:
                # Since a moment ago the policy has a slack: the push that is sent again waits.
                raise Overloaded("the worker is too far ahead of the slowest one") from None
            except Lost:
                if not self._core.is_sharded:
                    # It has not counted, or this would be a replay.
                    self._intake.forget(claim)
                    raise
                # Where another shard refused the push meanwhile, that is on its way.
                if await self._hears(flight, SILENCE_S):
                    return flight.decided.result()
                raise
            if answer is not None and not self._core.is_sharded:
                record, evicted, replayed = answer
                if flight.decided.done():
                    return flight.decided.result()
                if era != writer.era:
                    raise Lost
                if replayed and not self._is_own(record, claim, is_asked_again=may_be_decided):
                    self._require_same(record, part.digest)
                    return Decision(record, None, replayed=True)
                self._receipts.remember(claim.key, record, evicted)
                if not record.seq:
                    return Decision(record, None)
                self.committed(claim.key, record, {}, self._members(claim.key, record, evicted))
                return flight.decided.result()
            # The order of several shards' decisions, and the reads that go with them, are in the log.
            if await self._hears(flight, SILENCE_S):
                return flight.decided.result()
            if answer is not None and not answer[0].seq:
                return Decision(answer[0], None)
            # Other shards may still commit it, so this part is kept, even without Redis.
            self._recovery.catch_up()

    async def _ask(
        self, claim: Claim, flight: Flight, part: StagedPart, options: PushOptions
    ) -> tuple[Record, Sequence[str], bool] | None:
        """What Redis decides, the idempotency keys that it evicts, and whether it had decided that before."""
        owner, largest = self._core.owner(), largest_norm(self._core.shard.spec)
        if (generation := flight.came_in) is not None:
            try:
                return await self._coordinator.push(claim, owner, part, largest, generation)
            except ProblemError:
                self._admissions.mistook()
                raise
        answer = await self._coordinator.commit(
            claim, owner, part, largest, flight.attempt, options.wanted, after_update=options.after_update
        )
        return None if answer is None else (*answer, False)

    def _is_own(self, record: Record, claim: Claim, *, is_asked_again: bool) -> bool:
        """Whether a decision that Redis had made before was made for a call of this request that had no answer.

        What was decided for another request has come here: its entry, or the receipt of a push that has none.
        """
        writer = self._core.writer
        if record.epoch != writer.epoch:
            return False
        if record.seq:
            return not writer.has(record.epoch, record.seq)
        return is_asked_again and claim.key not in self._receipts

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
