"""A run's part of Redis: leases, the admission and commit of pushes, steps.

Every change is one script of lua/, whose head says what it takes and returns; this file names the keys, calls the
scripts and raises their refusals. Leases are liveness; safety is the fencing token, checked when a push is
admitted and again when it is committed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any, NoReturn

from freestep.errors import (
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    MalformedRequest,
    ProblemError,
    RunNotInitialized,
)
from freestep.models import Lease, WorkerStatus
from freestep_service.aggregation import Policy
from freestep_service.records import Admission, Behind, Claim, Ended, Known, Lost, Pending, Record, RunState
from freestep_service.store import Store, reachable

__all__ = ["RUNS_KEY", "Coordinator"]

RUNS_KEY = "freestep:runs"
"""The set of all runs' names; the one key that no run owns."""


class Coordinator:
    """One run's keys and the calls that change them."""

    def __init__(self, store: Store, run: str, spec: str, policy: Policy) -> None:
        self._store = store
        self._run = run
        self._prefix = f"freestep:{{{run}}}:"
        names = ("run", "leases", "workers", "receipts", "pending", "group", "log", "ended")
        self._keys = [self._prefix + name for name in names]
        self._rules = (spec, policy.batch, policy.max_staleness, int(policy.distinct))

    # Runs

    async def create(self, epoch: int) -> str:
        """created, same or different."""
        async with reachable():
            await self._store.client.sadd(RUNS_KEY, self._run)
        return str(await self._store.run("create", self._keys, *self._rules, epoch))

    async def open(self, state: RunState) -> None:
        """Makes Redis say what the shard says."""
        receipts = [text for key, record in state.receipts.items() for text in (key, record.to_json())]
        group = json.dumps(dict(state.group))
        async with reachable():
            await self._store.client.sadd(RUNS_KEY, self._run)
            leases = list(await self._store.client.hvals(self._keys[2]))
        keys = [*self._keys, *map(self._window_key, leases)]
        await self._store.run(
            "open", keys, *self._rules, state.epoch, state.step, state.seq, int(state.initialized), group,
            json.dumps(leases), *receipts,
        )  # fmt: skip

    async def initialize(self) -> None:
        """Notes that the run has its parameters."""
        if await self._store.run("initialize", self._keys) == "missing":
            raise Behind

    async def delete(self) -> None:
        async with reachable():
            leases = (await self._store.client.hgetall(self._keys[2])).values()
        keys = [key for lease in leases for key in (self._lease_key(lease), self._window_key(lease))]
        await self._store.run("delete", [*self._keys, *keys])
        async with reachable():
            await self._store.client.srem(RUNS_KEY, self._run)

    async def read(self) -> dict[str, str]:
        """The run's hash; empty when Redis does not know the run."""
        return await self.read_run(self._store, self._run)

    @staticmethod
    async def read_run(store: Store, run: str) -> dict[str, str]:
        """Any run's hash."""
        async with reachable():
            fields: dict[str, str] = await store.client.hgetall(f"freestep:{{{run}}}:run")
        return fields

    # Leases

    async def grant(self, worker: str, ttl_ms: int) -> tuple[Lease, list[str]]:
        """A new lease, and the idempotency keys that were forgotten with the worker's older one."""
        lease, older = secrets.token_hex(16), await self._newest_lease(worker)
        while True:
            keys = [*self._keys, self._lease_key(lease), self._window_key(older), self._lease_key(older)]
            status, *rest = await self._store.run("grant", keys, worker, lease, ttl_ms, older)
            if status == "missing":
                raise Behind
            if status == "granted":
                token, epoch, step, *evicted = rest
                granted = Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)
                return granted, evicted
            older = rest[0]

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired, and EpochChanged when the run was restored since the grant."""
        status, *rest = await self._store.run("renew", [*self._keys, self._lease_key(lease)], lease)
        if status != "renewed":
            self._refuse(status, rest)
        worker, token, ttl_ms, epoch, step = rest
        return Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)

    async def release(self, lease: str, known: Known) -> Ended:
        """Raises Behind and LeaseExpired."""
        keys = [*self._keys, self._lease_key(lease), self._window_key(lease)]
        status, *rest = await self._store.run("release", keys, lease, *known)
        if status != "ended":
            self._refuse(status, rest)
        return Ended(rest[0], rest[1], rest[2], rest[3:])

    async def expire(self, known: Known) -> tuple[int, Ended | None]:
        """How many leases are live, and what came of ending those that have run out, if there was anything to do.

        Raises Behind.
        """
        live, waits, *pairs = await self._store.run("expired", self._keys)
        if not waits and not pairs:
            return live, None
        keys = [*self._keys, *(self._window_key(lease) for lease in pairs[1::2])]
        status, *rest = await self._store.run("expire", keys, *known, *pairs)
        if status != "ended":
            self._refuse(status, rest)
        return live, Ended(rest[0], rest[1], rest[2], rest[3:])

    async def closures(self, after_seq: int) -> list[Ended]:
        """The updates after `after_seq` that the end of a lease closed, read from the log."""
        async with reachable():
            entries = await self._store.client.xrange(self._keys[6], f"({after_seq}-0", "+")
            epoch = int(await self._store.client.hget(self._keys[0], "epoch") or 0)
        return [
            Ended(int(identifier.partition("-")[0]), int(fields["step"]), epoch, [])
            for identifier, fields in entries
            if "closed_by" in fields
        ]

    async def workers(self) -> list[WorkerStatus]:
        """The live workers, by name."""
        async with reachable():
            newest: dict[str, str] = await self._store.client.hgetall(self._keys[2])
            pipeline = self._store.client.pipeline(transaction=False)
            for lease in newest.values():
                pipeline.hgetall(self._lease_key(lease))
                pipeline.pttl(self._lease_key(lease))
            answers = await pipeline.execute() if newest else []
        live = []
        for (worker, lease), fields, ttl in zip(newest.items(), answers[::2], answers[1::2], strict=True):
            if fields and ttl > 0:
                status = {**fields, "worker": worker, "lease": lease, "expires_in_ms": ttl}
                live.append(WorkerStatus.model_validate(status))
        return sorted(live, key=lambda status: status.worker)

    # Pushes

    async def admit(self, claim: Claim, known: Known) -> Admission:
        """Renews the lease and decides what the claim can decide.

        Raises Behind, Pending and the refusals of lua/admit.lua.
        """
        status, *rest = await self._store.run("admit", *self._push_call(claim, known))
        match status:
            case "admitted":
                return Admission()
            case "replay":
                return Admission(Record.from_json(rest[0]), replayed=True)
            case "dropped":
                return Admission(Record.from_json(rest[0]), evicted=tuple(rest[1:]))
        self._refuse(status, rest)

    async def commit(self, claim: Claim, known: Known, digest: str) -> tuple[Record, list[str]]:
        """The policy's decision and the evicted keys. Raises Behind, Lost, LeaseExpired and EpochChanged."""
        keys, *arguments = self._push_call(claim, known)
        samples = 1.0 if claim.samples is None else claim.samples
        status, *rest = await self._store.run("commit", keys, *arguments, digest, repr(samples))
        if status != "committed":
            self._refuse(status, rest)
        return Record.from_json(rest[0]), rest[1:]

    async def discard(self, claim: Claim) -> None:
        """Forgets an admitted push."""
        await self._store.run("discard", self._keys, claim.key)

    def _push_call(self, claim: Claim, known: Known) -> tuple[Any, ...]:
        keys = [*self._keys, self._lease_key(claim.lease), self._window_key(claim.lease)]
        return keys, claim.lease, claim.token, claim.step, claim.key, claim.fingerprint(), *known

    def _lease_key(self, lease: str) -> str:
        return f"{self._prefix}lease:{lease}"

    def _window_key(self, lease: str) -> str:
        return f"{self._prefix}window:{lease}"

    async def _newest_lease(self, worker: str) -> str:
        async with reachable():
            return await self._store.client.hget(self._keys[2], worker) or ""

    def _refuse(self, status: str, rest: Iterable[Any]) -> NoReturn:
        match [status, *rest]:
            case ["behind"]:
                raise Behind
            case ["lost"]:
                raise Lost
            case ["pending"]:
                raise Pending
            case ["lease-expired"]:
                raise LeaseExpired
            case ["epoch-changed", epoch]:
                raise EpochChanged(f"the run is in epoch {epoch} now", epoch=epoch)
            case ["step-ahead", step]:
                raise MalformedRequest(f"Freestep-Step is ahead of the run's step {step}", step=step)
            case ["run-not-initialized"]:
                raise RunNotInitialized
            case ["idempotency-conflict"]:
                raise IdempotencyConflict
        raise ProblemError(f"unexpected answer of a script: {status}")
