"""A run's part of Redis: leases, the admission and commit of pushes, steps, and who owns which shard.

Every change is one script of lua/, whose head says what it takes and returns; this file names the keys, calls the
scripts and raises their refusals. Leases are liveness; safety is the fencing token, checked when a push is
admitted and again when it is committed, and so is the token of the shard's owner.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from freestep.api.models import Lease, Metric, WorkerStatus
from freestep.errors import (
    PROBLEMS,
    CoordinatorUnavailable,
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    MalformedRequest,
    NonFiniteGradient,
    RunNotInitialized,
    ShardUnavailable,
)
from freestep_service.coordination.store import Store, reachable
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import (
    Admission,
    Ahead,
    Behind,
    CheckpointId,
    Claim,
    Ended,
    Fenced,
    LogPosition,
    Lost,
    Pending,
    Record,
    RunState,
    RunView,
)
from freestep_service.domain.reports import Measured

__all__ = ["RUNS_KEY", "Coordinator", "Owner"]

RUNS_KEY = "freestep:runs"
"""The set of all runs' names; no run owns it."""


class Owner(NamedTuple):
    """A shard, the token under which a process owns it, and how much of the log it has heard of."""

    shard: int
    token: str
    known: LogPosition


class Coordinator:
    """One run's keys and the calls that change them. All but `own` may raise Behind, Fenced and ShardUnavailable."""

    def __init__(self, store: Store, run: str, spec: str, policy: Policy) -> None:
        self._store = store
        self._run = run
        self._prefix = f"freestep:{{{run}}}:"
        names = (
            "run", "leases", "workers", "receipts", "pending", "group", "log", "ended",
            "shards", "staged", "queue", "cuts",
        )  # fmt: skip
        self._keys = [self._prefix + name for name in names]
        self._metrics_key = f"{self._prefix}metrics"
        self._rules = (spec, policy.batch, policy.max_staleness, int(policy.distinct), policy.slack)

    @property
    def channel(self) -> str:
        """Where shards hear what other callers brought about."""
        return f"{self._prefix}messages"

    # Runs

    async def create(self, epoch: int, shards: int) -> str:
        """created, same or different."""
        with reachable():
            await self._store.client.sadd(RUNS_KEY, self._run)
        return str(await self._store.run("create", self._keys, *self._rules, epoch, shards))

    async def delete(self) -> None:
        with reachable():
            leases = (await self._store.client.hgetall(self._keys[2])).values()
        keys = [key for lease in leases for key in (self._lease_key(lease), self._window_key(lease))]
        await self._store.run("delete", [*self._keys, self._metrics_key, *keys])
        with reachable():
            await self._store.client.srem(RUNS_KEY, self._run)

    async def read(self) -> RunView | None:
        """How the run stands; None when Redis does not know it."""
        return await self.read_run(self._store, self._run)

    @staticmethod
    async def read_run(store: Store, run: str) -> RunView | None:
        """Any run's standing; nothing is said in it of the time."""
        with reachable():
            pipeline = store.client.pipeline(transaction=False)
            pipeline.hgetall(f"freestep:{{{run}}}:run")
            pipeline.hgetall(f"freestep:{{{run}}}:shards")
            fields, shards = await pipeline.execute()
        return RunView(fields, shards, 0) if "spec" in fields else None

    # Ownership and opening

    async def own(
        self, node: str, url: str, ttl_ms: int, wanted: Sequence[int], says: Mapping[str, str]
    ) -> RunView | None:
        """Prolongs what the process owns, takes the wanted shards that are free; None when there is no such run."""
        status, *rest = await self._store.run(
            "run_heartbeat", self._keys, node, url, ttl_ms, json.dumps(list(wanted)), json.dumps(dict(says))
        )
        if status == "missing":
            return None
        fields, shards, now = rest
        return RunView(_pairs(fields), _pairs(shards), int(now))

    async def gather(self, shards: int, generation: int | None = None, resharding: int | None = None) -> int:
        """Closes the run to pushes until its shards have said where they stand; returns the new generation."""
        with reachable():
            await self._store.client.sadd(RUNS_KEY, self._run)
        arguments = (*self._rules, shards, _or_empty(generation), _or_empty(resharding))
        return int(await self._store.run("gather", self._keys, *arguments))

    async def report(self, owner: Owner, generation: int, report: str) -> list[str] | None:
        """Says where a shard stands. All shards' reports, in order, once all are there."""
        status, *rest = await self._store.run("report_shard", self._keys, owner.shard, owner.token, generation, report)
        if status == "fenced":
            raise Fenced
        return rest if status == "gathered" else None

    async def open(self, state: RunState, shards: int, generation: int, target: Mapping[str, Any]) -> bool:
        """Makes Redis say what the state says, and the shards load it; False where another generation has begun."""
        receipts = [text for key, record in state.receipts.items() for text in (key, record.to_json())]
        group = json.dumps(dict(state.group))
        metrics = {
            name: json.dumps([[step, repr(value)] for step, value in steps.items()])
            for name, steps in state.reported.items()
        }
        with reachable():
            await self._store.client.sadd(RUNS_KEY, self._run)
            leases = list(await self._store.client.hvals(self._keys[2]))
        keys = [*self._keys, self._metrics_key, *map(self._window_key, leases)]
        (status,) = await self._store.run(
            "open", keys, *self._rules, shards, state.epoch, state.step, state.seq, int(state.initialized), group,
            json.dumps(leases), generation, json.dumps(dict(target)), json.dumps(metrics), *receipts,
        )  # fmt: skip
        return bool(status == "load")

    async def loaded(self, owner: Owner, generation: int) -> str:
        """waiting, open, or late."""
        status = str(await self._store.run("loaded", self._keys, owner.shard, owner.token, generation))
        if status == "fenced":
            raise Fenced
        return status

    async def leave(self, owners: Iterable[Owner]) -> None:
        """Gives up shards."""
        arguments = [text for owner in owners for text in (owner.shard, owner.token)]
        if arguments:
            await self._store.run("give_up_shards", self._keys, *arguments)

    async def reshard(self, generation: int, shards: int) -> None:
        """ConsistentReads the run anew, once what its shards hold is on disk."""
        await self._store.run("reshard", self._keys, generation, shards)

    async def initialize(self, owner: Owner, upload: str, progress: str, patience_ms: int) -> str:
        """Says how far a shard is with its part of an upload: coming, staged or withdrawn.

        Returns coming, waiting, staged, initialized or already-initialized, see lua/initial_weights.lua.
        """
        arguments = (owner.shard, owner.token, upload, *owner.known, progress, patience_ms)
        status = await self._store.run("initial_weights", self._keys, *arguments)
        if status in ("coming", "waiting", "staged", "initialized", "already-initialized"):
            return str(status)
        self._refuse(status, ["[]"] if status == "not-open" else [])

    # Leases

    async def grant(self, worker: str, ttl_ms: int) -> tuple[Lease, list[str]]:
        """A new lease, and the idempotency keys that were forgotten with the worker's older one."""
        lease, older = secrets.token_hex(16), await self._newest_lease(worker)
        while True:
            keys = [*self._keys, self._lease_key(lease), self._window_key(older), self._lease_key(older)]
            status, *rest = await self._store.run("lease_grant", keys, worker, lease, ttl_ms, older)
            if status == "missing":
                raise Behind
            if status == "granted":
                token, epoch, step, *evicted = rest
                granted = Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)
                return granted, evicted
            if status != "changed":
                self._refuse(status, rest)
            older = rest[0]

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired, and EpochChanged when the run was restored since the grant."""
        status, *rest = await self._store.run("lease_renew", [*self._keys, self._lease_key(lease)], lease)
        if status != "renewed":
            self._refuse(status, rest)
        worker, token, ttl_ms, epoch, step = rest
        return Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)

    async def release(self, lease: str, known: LogPosition) -> Ended:
        """Raises Behind and LeaseExpired."""
        keys = [*self._keys, self._lease_key(lease), self._window_key(lease)]
        status, *rest = await self._store.run("lease_release", keys, lease, *known)
        if status != "ended":
            self._refuse(status, rest)
        return Ended(rest[0], rest[1], rest[2], rest[3:])

    async def expire(self, known: LogPosition, patience_ms: int) -> tuple[int, int, Ended | None]:
        """How many leases are live, how many ms the one that ends next has left, and what came of ending those that
        have run out, if there was anything to do.

        patience_ms: how long a push may take to reach all shards while others wait. Raises Behind.
        """
        live, waits, left_ms, *pairs = await self._store.run("leases_due", self._keys, patience_ms)
        if not waits and not pairs:
            return live, left_ms, None
        keys = [*self._keys, *(self._window_key(lease) for lease in pairs[1::2])]
        status, *rest = await self._store.run("leases_expire", keys, *known, patience_ms, *pairs)
        if status != "ended":
            self._refuse(status, rest)
        return live, left_ms, Ended(rest[0], rest[1], rest[2], rest[3:])

    async def entries(self, after_seq: int) -> list[dict[str, Any]]:
        """The log's entries after `after_seq`."""
        with reachable():
            entries = await self._store.client.xrange(self._keys[6], f"({after_seq}-0", "+")
        return [json.loads(fields["entry"]) for _, fields in entries]

    async def workers(self) -> list[WorkerStatus]:
        """The live workers, by name."""
        with reachable():
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

    async def admit(self, claim: Claim, owner: Owner, sent: Sequence[str] = ()) -> Admission:
        """Renews the lease and decides what the claim can decide.

        sent: tickets of cuts whose parts the shard has sent, as of `done`.
        Raises Pending, Ahead and the refusals of lua/admit.lua.
        """
        keys, *arguments = self._push_call(claim, owner)
        status, *rest = await self._store.run("admit", keys, *arguments, *sent)
        match status:
            case "admitted":
                return Admission()
            case "queued":
                return Admission(queued=True)
            case "replay":
                return Admission(Record.from_json(rest[0]), replayed=True)
            case "dropped":
                return Admission(Record.from_json(rest[0]), evicted=tuple(rest[1:]))
        self._refuse(status, rest)

    async def check(self, claim: Claim) -> None:
        """Raises what admit would refuse a claim with, whichever shard it is for; renews nothing."""
        keys = [*self._keys, self._lease_key(claim.lease)]
        said = (claim.lease, claim.token, claim.step, claim.key, claim.fingerprint())
        status, *rest = await self._store.run("precheck_claim", keys, *said)
        if status != "passed":
            self._refuse(status, rest)

    async def commit(
        self,
        claim: Claim,
        owner: Owner,
        digest: str,
        norm: float,
        largest_norm: float | None,
        wanted: str = "",
        *,
        after_update: bool = False,
    ) -> tuple[Record, list[str]] | None:
        """The policy's decision and the evicted keys; None while other shards have not staged their parts.

        wanted: the point and dtype to answer with, as of the push's place in the log, or of its group's update.
        Raises Lost, LeaseExpired, EpochChanged and NonFiniteGradient (the norm over all shards is too large).
        """
        keys, *arguments = self._push_call(claim, owner)
        largest = "" if largest_norm is None else repr(largest_norm)
        speed = "" if claim.speed is None else repr(claim.speed)
        status, *rest = await self._store.run(
            "commit", keys, *arguments, digest, repr(norm), largest, wanted, int(after_update), speed
        )
        if status == "staged":
            return None
        if status != "committed":
            self._refuse(status, rest)
        return Record.from_json(rest[0]), rest[1:]

    async def discard(self, claim: Claim, shard: int, slug: str = "", detail: str = "") -> None:
        """Forgets a shard's part of an admitted push; with a slug, all shards refuse it."""
        await self._store.run("discard_part", self._keys, claim.key, shard, slug, detail)

    # Metrics

    async def measure(self, owner: Owner, measured: Measured, epoch: int | None) -> tuple[int, dict[str, Any] | None]:
        """The run's epoch, and the log entry that a report has become; none where it had counted before.

        epoch: that of the x, where it is said. Raises the refusals of lua/report_metric.lua.
        """
        name, step, value = measured
        status, *rest = await self._store.run(
            "report_metric", [*self._keys, self._metrics_key], *owner.known, owner.shard, owner.token, name,
            repr(value), step, _or_empty(epoch),
        )  # fmt: skip
        match [status, *rest]:
            case ["noted", epoch_now, entry]:
                return epoch_now, json.loads(entry)
            case ["replay", epoch_now]:
                return epoch_now, None
            case ["conflict"]:
                raise IdempotencyConflict(f"{name} at step {step} was reported before, with another value")
            case ["forgotten", oldest]:
                raise MalformedRequest(f"reports of {name} from before step {oldest} are forgotten", field="step")
            case ["crowded", most]:
                raise MalformedRequest(f"the run has {most} metrics already, which is the most", field="name")
        self._refuse(status, rest)

    async def metrics(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        with reachable():
            reported = await self._store.client.hgetall(self._metrics_key)
        newest = {name: json.loads(steps)[-1] for name, steps in sorted(reported.items())}
        return {name: Metric(value=float(value), step=step) for name, (step, value) in newest.items()}

    # ConsistentReads and checkpoints

    async def cut(self, owner: Owner, ticket: str, wanted: str, readers: int) -> int:
        """The place in the log of a ticket's cut, 0 while there is no memory for it."""
        status, *rest = await self._store.run(
            "request_cut", self._keys, *owner.known, owner.shard, owner.token, ticket, wanted, readers
        )
        if status != "cut":
            self._refuse(status, rest)
        return int(rest[0])

    async def done(self, tickets: Sequence[str]) -> None:
        """A shard has sent its parts of these cuts."""
        await self._store.run("cut_sent", self._keys, *tickets)

    async def mark(self, owner: Owner) -> CheckpointId:
        """Marks the place in the log where shards take their parts of a checkpoint."""
        status, *rest = await self._store.run("mark_checkpoint", self._keys, *owner.known, owner.shard, owner.token)
        if status != "marked":
            self._refuse(status, rest)
        return CheckpointId(*map(int, rest))

    async def written(self, owner: Owner, cut: CheckpointId, size: int) -> bool:
        """A shard's part of a checkpoint is on disk; whether all are."""
        status = await self._store.run(
            "checkpoint_part_written", self._keys, owner.shard, owner.token, str(cut), cut.step, size
        )
        if status == "fenced":
            raise Fenced
        return bool(status == "durable")

    def _push_call(self, claim: Claim, owner: Owner) -> tuple[Any, ...]:
        keys = [*self._keys, self._lease_key(claim.lease), self._window_key(claim.lease)]
        place = (*owner.known, owner.shard, owner.token)
        return keys, claim.lease, claim.token, claim.step, claim.key, claim.fingerprint(), *place

    def _lease_key(self, lease: str) -> str:
        return f"{self._prefix}lease:{lease}"

    def _window_key(self, lease: str) -> str:
        return f"{self._prefix}window:{lease}"

    async def _newest_lease(self, worker: str) -> str:
        with reachable():
            return await self._store.client.hget(self._keys[2], worker) or ""

    def _refuse(self, status: str, rest: Iterable[Any]) -> NoReturn:
        match [status, *rest]:
            case ["behind"]:
                raise Behind
            case ["fenced"]:
                raise Fenced
            case ["not-open", missing]:
                raise not_open(self._run, json.loads(missing))
            case ["lost"]:
                raise Lost
            case ["pending"]:
                raise Pending
            case ["ahead"]:
                raise Ahead
            case ["lease-expired"]:
                raise LeaseExpired
            case ["epoch-changed", epoch]:
                raise EpochChanged(f"the run is in epoch {epoch} now", epoch=epoch)
            case ["step-ahead", step]:
                raise MalformedRequest(f"the step is ahead of the run's step {step}", step=step)
            case ["run-not-initialized"]:
                raise RunNotInitialized
            case ["idempotency-conflict"]:
                raise IdempotencyConflict
            case ["refused-before", slug, detail]:
                raise PROBLEMS[slug](detail or None)
            case ["refused"]:
                raise NonFiniteGradient("the gradient's norm is so large that its square overflows fp32")
        raise CoordinatorUnavailable(f"unexpected answer of a script: {status}")


def not_open(run: str, missing: Sequence[int]) -> ShardUnavailable:
    """What is said of a run that is not open."""
    if missing:
        listed = ", ".join(map(str, missing))
        return ShardUnavailable(f"nobody owns shard {listed} of the run {run!r}", missing=list(missing))
    return ShardUnavailable(f"the shards of the run {run!r} are being opened", missing=[])


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _or_empty(number: int | None) -> str:
    return "" if number is None else str(number)
