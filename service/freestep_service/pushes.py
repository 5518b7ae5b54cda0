"""The way of a push: admit, stage, commit, apply.

admit (Redis: lease, token, epoch, key, staleness) decides what the claim can decide. stage receives the body into a
vector and checks it. commit (Redis) is the policy's decision, the step and a place in the log. apply is the
shard's, in the order of the log. Until a push is committed it has changed nothing; once it is, it will be applied,
whatever becomes of the request that carried it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from freestep.errors import (
    CoordinatorUnavailable,
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    NonFiniteGradient,
    Overloaded,
)
from freestep.models import RunSpec
from freestep.wire import Manifest, Receiver
from freestep_service.aggregation import Policy, damping
from freestep_service.coordinator import Coordinator
from freestep_service.ingest import Body, widen_and_measure
from freestep_service.records import Admission, Behind, Claim, Lost, Pending, Record
from freestep_service.settings import Settings
from freestep_service.shard import Entry
from freestep_service.vectors import Vector, VectorPool
from freestep_service.writer import Writer

__all__ = ["Pushes", "Receipts", "stage", "staging_vectors"]

_LARGEST_NORM = 2.0**63
"""A moving average of squares that has once overflowed fp32 stays infinite; with max_grad_norm it cannot."""
_RETRY_S = 0.2
"""Pause before Redis is asked again for a commit whose answer was lost."""


class Receipts(dict[str, Record]):
    """The decided pushes by idempotency key, oldest first: the same that Redis holds."""

    def remember(self, key: str, record: Record, evicted: list[str] | tuple[str, ...]) -> None:
        self[key] = record
        self.forget(evicted)

    def forget(self, keys: list[str] | tuple[str, ...]) -> None:
        for key in keys:
            self.pop(key, None)

    def until(self, seq: int) -> dict[str, Record]:
        """Those of the log up to an entry, and the dropped, which have no place in it."""
        return {key: record for key, record in self.items() if record.seq <= seq}


@dataclass(frozen=True)
class _Staged:
    vector: Vector
    norm: float
    digest: str


@dataclass
class _Flight:
    """A key that is on its way; whoever sends it again waits until it has landed."""

    fingerprint: str
    landed: asyncio.Event = field(default_factory=asyncio.Event)


async def stage(body: Body, manifest: Manifest, vector: Vector) -> tuple[float | None, str]:
    """Receives a body's tensors into a vector, as fp32; returns their norm, None if not finite, and the digest.

    Raises MalformedTensors and MalformedRequest.
    """
    receiver = Receiver(manifest, vector.bytes, body.length)
    digest = await body.receive_into(receiver)
    return await asyncio.to_thread(widen_and_measure, vector, manifest, receiver.dtypes), digest


class Pushes:
    """The pushes of one run."""

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        coordinator: Coordinator,
        writer: Writer,
        staging: VectorPool,
        receipts: Receipts,
        settings: Settings,
        reopen: Callable[[], Awaitable[None]],
    ) -> None:
        self._spec = spec
        self._manifest = manifest
        self._coordinator = coordinator
        self._writer = writer
        self._staging = staging
        self._receipts = receipts
        self._settings = settings
        self._reopen = reopen
        self._flights: dict[str, _Flight] = {}
        self._commits: set[asyncio.Task[Record]] = set()

    async def push(self, claim: Claim, body: Body) -> tuple[Record, bool]:
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
            staged = await self._stage(claim, body)
            commit = asyncio.create_task(self._commit(claim, staged))
            self._commits.add(commit)
            commit.add_done_callback(lambda _: self._land(claim, flight))
            commit.add_done_callback(self._commits.discard)
        finally:
            if commit is None:
                self._land(claim, flight)
        try:
            async with asyncio.timeout(self._settings.commit_seconds):
                return await asyncio.shield(commit), False
        except TimeoutError:
            commit.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise CoordinatorUnavailable("Redis has not answered whether the push is committed") from None

    async def settle(self, record: Record, wait: float) -> Record:
        """Waits, for at most `wait` seconds, until the update that an accumulated push is part of is applied."""
        if record.decision != "accumulated" or wait <= 0:
            return record
        epoch = self._writer.epoch
        if await self._writer.reach(record.step + 1, wait):
            return replace(record, decision="applied", step=record.step + 1)
        if self._writer.epoch != epoch:
            raise EpochChanged(f"the run is in epoch {self._writer.epoch} now", epoch=self._writer.epoch)
        return record

    async def close(self) -> bool:
        """Gives up the commits that Redis has not answered; whether there were none."""
        pending = [task for task in self._commits if not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return not pending

    async def _landed(self, flight: _Flight) -> None:
        try:
            async with asyncio.timeout(self._settings.commit_seconds):
                await flight.landed.wait()
        except TimeoutError:
            raise CoordinatorUnavailable("the push is still on its way through another request") from None

    def _land(self, claim: Claim, flight: _Flight) -> None:
        del self._flights[claim.key]
        flight.landed.set()

    async def _admit(self, claim: Claim) -> Admission:
        while True:
            try:
                admission = await self._coordinator.admit(claim, self._writer.known)
            except Behind:
                await self._reopen()
            except Pending:
                # Admitted before, but by no request that is still here: its answer or its body was lost.
                return Admission()
            else:
                if admission.record is not None and not admission.replayed:
                    self._receipts.remember(claim.key, admission.record, admission.evicted)
                return admission

    async def _answer(self, claim: Claim, admission: Admission, record: Record, body: Body) -> tuple[Record, bool]:
        # A push that was dropped on its claim alone has no digest: its body was never read.
        if admission.replayed and record.digest and record.digest != await body.receive_digest():
            raise IdempotencyConflict("the idempotency key came before with another body")
        return record, admission.replayed

    async def _stage(self, claim: Claim, body: Body) -> _Staged:
        vector = None
        try:
            try:
                async with asyncio.timeout(self._settings.queue_seconds):
                    vector = await self._staging.acquire()
            except TimeoutError:
                raise Overloaded from None
            norm, digest = await stage(body, self._manifest, vector)
            if norm is None:
                raise NonFiniteGradient("the gradient holds NaN or infinity")
            if norm > _LARGEST_NORM and self._spec.optimizer.max_grad_norm is None:
                raise NonFiniteGradient(f"the gradient's norm is {norm:.3g}, and its square overflows fp32", norm=norm)
            return _Staged(vector, norm, digest)
        except BaseException:
            if vector is not None:
                self._staging.release(vector)
            with suppress(CoordinatorUnavailable):
                await self._coordinator.discard(claim)
            raise

    async def _commit(self, claim: Claim, staged: _Staged) -> Record:
        """Commits and applies. Redis is asked until it answers: what it decided must not stay unknown."""
        try:
            record = await self._decide(claim, staged)
            if record.seq:
                try:
                    await self._writer.apply(self._entry(claim, staged, record))
                except Lost:
                    if self._receipts.get(claim.key) is record:
                        del self._receipts[claim.key]
                    raise
            return record
        except Lost:
            raise LeaseExpired("the run was opened again before the push was applied") from None
        finally:
            self._staging.release(staged.vector)

    async def _decide(self, claim: Claim, staged: _Staged) -> Record:
        while True:
            era = self._writer.era
            try:
                record, evicted = await self._coordinator.commit(claim, self._writer.known, staged.digest)
            except CoordinatorUnavailable:
                await asyncio.sleep(_RETRY_S)
            except Behind:
                with suppress(CoordinatorUnavailable):
                    await self._reopen()
            else:
                if era != self._writer.era:
                    raise Lost
                self._receipts.remember(claim.key, record, evicted)
                return record

    def _entry(self, claim: Claim, staged: _Staged, record: Record) -> Entry:
        limit = self._spec.optimizer.max_grad_norm
        return Entry(
            seq=record.seq,
            epoch=record.epoch,
            advance=record.decision == "applied",
            gradient=staged.vector.tensor(),
            worker=record.worker,
            weight=1.0 if claim.samples is None else claim.samples,
            # As torch.nn.utils.clip_grad_norm_.
            scale=1.0 if limit is None else min(1.0, limit / (staged.norm + 1e-6)),
            damping=damping(self._spec.aggregation, record.staleness, record.live),
        )


def staging_vectors(policy: Policy) -> int:
    """How many bodies may be received at once: with a group's accumulator and two snapshots, the run has at most
    batch + 3 vectors in flight."""
    return max(2, policy.concurrency)
