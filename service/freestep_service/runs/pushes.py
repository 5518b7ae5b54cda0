"""The way of a push through a shard: admit, stage, commit, apply.

admit (Redis: lease, token, epoch, key, staleness) decides what the claim can decide. stage receives the body into a
vector and checks it. commit (Redis), by the last shard to stage its part, is the policy's decision, the step and a
place in the log; the other shards hear of it. apply is each shard's, in the order of the log. Until a push is committed
it has changed nothing; once it is, it will be applied on all shards, whatever becomes of the requests that carried it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from freestep.api.models import RunSpec
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
from freestep.wire.encoding import ENCODINGS
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.aggregation import damping, lateness
from freestep_service.domain.records import (
    Admission,
    Ahead,
    Behind,
    Claim,
    Fenced,
    Lost,
    Owner,
    Pending,
    Receipts,
    Record,
    StagedPart,
)
from freestep_service.optimizers import Pushed
from freestep_service.settings import Settings
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.shard import Entry
from freestep_service.state.staging import Body, stage
from freestep_service.state.writer import Writer

__all__ = ["Host", "PushOptions", "Pushes"]

_LARGEST_NORM = 2.0**63
"""A moving average of squares that has once overflowed fp32 stays infinite; with max_grad_norm it cannot."""
_RETRY_S = 0.2
"""Pause before Redis is asked again for a commit whose answer was lost."""
_SILENCE_S = 1.0
"""How long what others are to say is listened for before Redis is asked for it."""


@dataclass(frozen=True)
class PushOptions:
    """What a push's sender wants in answer: a point and dtype ("y F32"), and to wait for its group's update."""

    wanted: str = ""
    after_update: bool = False


@dataclass(frozen=True)
class _Staged:
    vector: Vector
    gradient: Pushed
    norm: float
    digest: str


@dataclass(frozen=True)
class _Decision:
    record: Record
    cuts: Mapping[str, str] = field(default_factory=dict)


class _Flight:
    """A key that is on its way; whoever sends it again waits until it has landed."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.landed = asyncio.Event()
        self.granted = asyncio.Event()
        """Its turn has come to send its body."""
        self.decided: asyncio.Future[_Decision] = asyncio.get_running_loop().create_future()
        """What is heard of its decision; the refusal, where another shard refused it."""

    def refuse(self, problem: ProblemError) -> None:
        if not self.decided.done():
            self.decided.set_exception(problem)
            # It may come before anybody waits for it.
            self.decided.exception()
        self.granted.set()


class Host(Protocol):
    """What a shard's pushes ask of their run."""

    @property
    def many(self) -> bool:
        """Whether the run has other shards, of which decisions are heard."""

    async def reopen(self) -> None:
        """Has the run opened again, because Redis has lost its data."""

    async def catch_up(self) -> None:
        """Reads what of the log was not heard."""

    def fenced(self) -> None:
        """Somebody else owns the shard."""


class Pushes:
    """The pushes of one shard."""

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        coordinator: Coordinator,
        writer: Writer,
        owner: Callable[[], Owner],
        receipts: Receipts,
        settings: Settings,
        staging: VectorPool,
        locks: DeviceLocks,
        host: Host,
        sent: Callable[[], Sequence[str]],
    ) -> None:
        self._spec = spec
        self._manifest = manifest
        self._coordinator = coordinator
        self._writer = writer
        self._owner = owner
        self._receipts = receipts
        self._settings = settings
        self._staging = staging
        self._locks = locks
        self._host = host
        self._sent = sent
        """Takes the tickets of the cuts that the shard has sent and not told Redis of."""
        self._flights: dict[str, _Flight] = {}
        self._commits: set[asyncio.Task[Record]] = set()
        self._moved = asyncio.Event()
        """Set, and replaced, when the slowest worker has moved on."""
        self._closed = False

    async def push(self, claim: Claim, body: Body, wish: PushOptions = PushOptions()) -> tuple[Record, bool]:
        """What was decided of a push, and whether that had been decided before."""
        while (earlier := self._flights.get(claim.key)) is not None:
            if earlier.fingerprint != claim.fingerprint():
                raise IdempotencyConflict
            await self._landed(earlier)
        flight = self._flights[claim.key] = _Flight(claim.fingerprint())
        commit = None
        try:
            admission = await self._admit(claim)
            if admission.record is not None:
                return await self._answer(claim, admission, admission.record, body)
            staged = await self._stage(claim, flight, body, queued=admission.queued)
            commit = asyncio.create_task(self._commit(claim, flight, staged, wish))
            self._commits.add(commit)
            commit.add_done_callback(lambda commit: self._over(claim, flight, commit))
        finally:
            if commit is None:
                self._land(claim, flight)
        await asyncio.wait([commit], timeout=self._settings.commit_seconds)
        if commit.cancelled():
            raise ShardUnavailable("the shard is being given up")
        if commit.done():
            return commit.result(), False
        if self._host.many:
            raise ShardUnavailable("the push has not reached all shards yet")
        raise CoordinatorUnavailable("Redis has not answered whether the push is committed")

    async def settle(self, record: Record, wait: float) -> Record:
        """Waits, for at most `wait` seconds, until the update that an accumulated push is part of is applied."""
        if record.decision != "accumulated" or wait <= 0:
            return record
        epoch = self._writer.epoch
        if await self._writer.reach(record.step + 1, wait):
            return record.settled(record.step + 1)
        if self._writer.epoch != epoch:
            raise EpochChanged(f"the run is in epoch {self._writer.epoch} now", epoch=self._writer.epoch)
        return record

    async def close(self) -> bool:
        """Gives up the commits that Redis has not answered; whether there were none."""
        # A cancellation that meets a timeout of Redis's is lost.
        self._closed = True
        self.moved()
        pending = [task for task in self._commits if not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return not pending

    # What is heard

    def granted(self, key: str) -> None:
        """A push's turn has come."""
        if flight := self._flights.get(key):
            flight.granted.set()

    def moved(self) -> None:
        """The slowest worker has moved on, or left: who waits for it may go on."""
        self._moved.set()
        self._moved = asyncio.Event()

    def refused(self, key: str, slug: str, detail: str) -> None:
        """Another shard refused a push, or its lease has ended."""
        if flight := self._flights.get(key):
            flight.refuse(PROBLEMS[slug](detail or None))

    def decided(self, key: str, record: Record, cuts: Mapping[str, str]) -> bool:
        """A push was decided; whether this shard holds its gradient."""
        flight = self._flights.get(key)
        if flight is None:
            return False
        if not flight.decided.done():
            flight.decided.set_result(_Decision(record, cuts))
        return True

    # The way

    async def _landed(self, flight: _Flight) -> None:
        try:
            async with asyncio.timeout(self._settings.commit_seconds):
                await flight.landed.wait()
        except TimeoutError:
            raise CoordinatorUnavailable("the push is still on its way through another request") from None

    def _land(self, claim: Claim, flight: _Flight) -> None:
        del self._flights[claim.key]
        flight.landed.set()

    def _over(self, claim: Claim, flight: _Flight, commit: asyncio.Task[Record]) -> None:
        self._land(claim, flight)
        self._commits.discard(commit)
        if not commit.cancelled():
            # Who asked may have left.
            commit.exception()

    async def _admit(self, claim: Claim) -> Admission:
        deadline = asyncio.get_running_loop().time() + self._settings.queue_seconds
        while True:
            moved = self._moved
            try:
                admission = await self._coordinator.pushes.admit(claim, self._owner(), self._sent())
            except Behind:
                await self._host.reopen()
            except Fenced:
                self._host.fenced()
                raise ShardUnavailable from None
            except Ahead:
                await self._wait_for_the_slowest(moved, deadline)
            except Pending:
                # Admitted before, but by no request that is still here: its answer or its body was lost.
                return Admission()
            else:
                if admission.record is not None and not admission.replayed:
                    self._receipts.remember(claim.key, admission.record, admission.evicted)
                return admission

    async def _wait_for_the_slowest(self, moved: asyncio.Event, deadline: float) -> None:
        """Returns when it has moved, or may have and that was not heard. Raises Overloaded past the deadline."""
        now = asyncio.get_running_loop().time()
        if self._closed or now >= deadline:
            raise Overloaded("the worker is too far ahead of the slowest one, and has waited for it")
        await _comes(moved, min(deadline - now, _SILENCE_S))

    async def _answer(self, claim: Claim, admission: Admission, record: Record, body: Body) -> tuple[Record, bool]:
        # A push that was dropped on its claim alone has no digest: its body was never read. Nor has one that was
        # pushed when the run was cut into other shards.
        digest = record.digest_of(self._manifest.begin, self._manifest.end)
        if admission.replayed and digest and digest != await body.receive_digest():
            raise IdempotencyConflict("the idempotency key came before with another body")
        return record, admission.replayed

    async def _stage(self, claim: Claim, flight: _Flight, body: Body, *, queued: bool) -> _Staged:
        vector = None if queued else self._staging.try_acquire()
        try:
            if vector is None:
                vector = await self._turn(claim, flight, queued=queued)
            gradient, norm, digest = await stage(body, self._manifest, vector, self._locks, ENCODINGS)
            if norm is None:
                raise NonFiniteGradient("the gradient holds NaN or infinity")
            if self._spec.optimizer.max_grad_norm is None and norm > _LARGEST_NORM:
                raise NonFiniteGradient(f"the gradient's norm is {norm:.3g}, and its square overflows fp32", norm=norm)
            return _Staged(vector, gradient, norm, digest)
        except BaseException as error:
            if vector is not None:
                self._staging.release(vector)
            with suppress(CoordinatorUnavailable):
                if isinstance(error, MalformedTensors | NonFiniteGradient):
                    await self._coordinator.pushes.discard(claim, self._owner().shard, error.slug, error.detail)
                else:
                    await self._coordinator.pushes.discard(claim, self._owner().shard)
            raise

    async def _turn(self, claim: Claim, flight: _Flight, *, queued: bool) -> Vector:
        """Memory for a body, when it is its turn. Raises Overloaded, and what `_admit` raises."""
        try:
            async with asyncio.timeout(self._settings.queue_seconds):
                while queued and not await _comes(flight.granted):
                    # It may have come unheard; or the run was opened anew, and there is no line any more.
                    queued = (await self._admit(claim)).queued
                return await self._staging.acquire()
        except TimeoutError:
            raise Overloaded from None

    async def _commit(self, claim: Claim, flight: _Flight, staged: _Staged, wish: PushOptions) -> Record:
        """Commits and applies. Redis is asked until it answers: what it decided must not stay unknown."""
        try:
            decision = await self._decide(claim, flight, staged, wish)
            record = decision.record
            if record.seq:
                try:
                    await self._writer.apply(self._entry(claim, staged, decision))
                except Lost:
                    if self._receipts.get(claim.key) is record:
                        del self._receipts[claim.key]
                    raise
            return record
        except Lost:
            if self._host.many:
                raise ShardUnavailable("the run was opened again before the push was applied") from None
            raise LeaseExpired("the run was opened again before the push was applied") from None
        finally:
            self._staging.release(staged.vector)

    async def _decide(self, claim: Claim, flight: _Flight, staged: _Staged, wish: PushOptions) -> _Decision:
        largest = _LARGEST_NORM if self._spec.optimizer.max_grad_norm is None else None
        while True:
            if self._closed:
                raise asyncio.CancelledError
            era = self._writer.era
            try:
                answer = await self._coordinator.pushes.commit(
                    claim,
                    self._owner(),
                    StagedPart(self._manifest.begin, self._manifest.end, staged.digest, staged.norm),
                    largest,
                    wish.wanted,
                    after_update=wish.after_update,
                )
            except (CoordinatorUnavailable, ShardUnavailable):
                await asyncio.sleep(_RETRY_S)
                continue
            except Fenced:
                self._host.fenced()
                raise ShardUnavailable from None
            except Behind:
                with suppress(CoordinatorUnavailable, ShardUnavailable):
                    await self._host.reopen()
                continue
            except Lost:
                # Where another shard refused the push meanwhile, that is on its way.
                heard, _ = await asyncio.wait([flight.decided], timeout=_SILENCE_S if self._host.many else 0)
                if heard:
                    return flight.decided.result()
                raise
            if answer is not None and not self._host.many:
                record, evicted = answer
                if era != self._writer.era:
                    raise Lost
                self._receipts.remember(claim.key, record, evicted)
                return _Decision(record)
            # Of several shards' decisions the log's order, and the cuts that go with them, are heard.
            heard, _ = await asyncio.wait([flight.decided], timeout=_SILENCE_S)
            if heard:
                return flight.decided.result()
            if answer is not None and not answer[0].seq:
                return _Decision(answer[0])
            # Other shards may still commit it: not even without Redis is this part given up.
            with suppress(CoordinatorUnavailable):
                await self._host.catch_up()

    def _entry(self, claim: Claim, staged: _Staged, decision: _Decision) -> Entry:
        limit, record = self._spec.optimizer.max_grad_norm, decision.record
        return Entry(
            seq=record.seq,
            epoch=record.epoch,
            advance=record.decision == "applied",
            gradient=staged.gradient,
            worker=record.worker,
            weight=1.0 if claim.samples is None else claim.samples,
            # As torch.nn.utils.clip_grad_norm_.
            scale=1.0 if limit is None else min(1.0, limit / (float(record.norm) + 1e-6)),
            damping=damping(self._spec.aggregation, record.staleness, record.live),
            lateness=lateness(self._spec.aggregation, record.staleness),
            staleness=record.staleness,
            live=record.live,
            loss=claim.loss or 0.0,
            cuts=decision.cuts,
        )


async def _comes(event: asyncio.Event, seconds: float = _SILENCE_S) -> bool:
    """Waits for an event, for as long at the most; whether it has come."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
