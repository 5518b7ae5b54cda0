"""The leases of a run's workers.

Leases are liveness. Safety is the fencing token, which is checked when a push is admitted and when it is committed.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, NamedTuple

from freestep.api.models import Lease, WorkerStatus
from freestep.errors import MalformedRequest
from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.coordination.store import reachable
from freestep_service.domain.records import Ended, LogPosition, Owner

__all__ = ["EndedWorker", "Expired", "RunLeases"]


class Expired(NamedTuple):
    """How many leases are live, how long the one that ends next has left (ms), and the result of ending others."""

    live: int
    left_ms: int
    ended: Ended | None
    """None if there was nothing to end."""


class EndedWorker(NamedTuple):
    """What became of a worker's lease; newer_lease: the one to name instead, with which nothing was done yet."""

    had_lease: bool = False
    entry: dict[str, Any] | None = None
    """The entry of the log, if there is one."""
    evicted: tuple[str, ...] = ()
    newer_lease: str | None = None


class RunLeases:
    """The leases of one run."""

    def __init__(self, scripts: RunScripts) -> None:
        self._scripts = scripts

    async def grant(self, worker: str, ttl_ms: int) -> tuple[Lease, list[str]]:
        """A new lease, and the idempotency keys whose receipts were dropped with the worker's older lease.

        Raises Behind, ShardUnavailable, WorkerBanned and WorkerSuspended.
        """
        scripts = self._scripts
        lease, older = secrets.token_hex(16), await self.newest_lease(worker)
        while True:
            keys = [scripts.lease_key(lease), scripts.window_key(older), scripts.lease_key(older)]
            status, *rest = await scripts.call("lease_grant", worker, lease, ttl_ms, older, keys=keys)
            if status == "granted":
                token, epoch, step, *evicted = rest
                granted = Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)
                return granted, evicted
            if status != "changed":
                scripts.refuse(status, rest)
            older = rest[0]

    async def renew(self, lease: str) -> Lease:
        """Raises LeaseExpired, and EpochChanged when the run was restored since the grant."""
        status, *rest = await self._scripts.call("lease_renew", lease, keys=[self._scripts.lease_key(lease)])
        if status != "renewed":
            self._scripts.refuse(status, rest)
        worker, token, ttl_ms, epoch, step = rest
        return Lease(lease=lease, token=int(token), worker=worker, ttl_ms=ttl_ms, epoch=epoch, step=step)

    async def release(self, lease: str, position: LogPosition) -> tuple[str, Ended]:
        """Ends a lease, and returns whose it was. Raises Behind and LeaseExpired."""
        keys = [self._scripts.lease_key(lease), self._scripts.window_key(lease)]
        status, *rest = await self._scripts.call("lease_release", lease, *position, keys=keys)
        if status != "ended":
            self._scripts.refuse(status, rest)
        worker, seq, step, epoch, *evicted = rest
        return worker, Ended(seq, step, epoch, evicted, [worker])

    async def end_worker(
        self, owner: Owner, worker: str, lease: str, ban_s: int | None, asked: str, by: str, key: str = ""
    ) -> EndedWorker:
        """Ends a worker's lease and refuses it others for `ban_s` seconds; 0 lifts that, None leaves it.

        lease: its newest, empty if it has none. asked: the request, JSON. by: the name of who asks. key: of the
        request, which is answered alike, without an entry, if it comes again; empty for none. Raises Behind, Fenced,
        ShardUnavailable, RunNotInitialized and MalformedRequest.
        """
        keys = [self._scripts.lease_key(lease), self._scripts.window_key(lease)]
        ban_ms = "" if ban_s is None else 1000 * ban_s
        status, *rest = await self._scripts.call(
            "end_worker", *owner.position, owner.shard, owner.token, worker, lease, ban_ms, asked, by, key, keys=keys
        )
        match [status, *rest]:
            case ["ended", had_lease, entry, *evicted]:
                return EndedWorker(bool(had_lease), json.loads(entry) if entry else None, tuple(evicted))
            case ["lease", newer]:
                return EndedWorker(newer_lease=newer)
            case ["crowded", most]:
                raise MalformedRequest(f"the run refuses leases to {most} workers already, which is the most")
        self._scripts.refuse(status, rest)

    async def expire(self, position: LogPosition, patience_ms: int) -> Expired:
        """Ends the leases that have run out.

        patience_ms: how long a push may take to reach all shards while others wait. Raises Behind.
        """
        live, is_due, left_ms, *pairs = await self._scripts.call("leases_due", patience_ms)
        if not is_due and not pairs:
            return Expired(live, left_ms, None)
        keys = [self._scripts.window_key(lease) for lease in pairs[1::2]]
        status, *rest = await self._scripts.call("leases_expire", *position, patience_ms, *pairs, keys=keys)
        if status != "ended":
            self._scripts.refuse(status, rest)
        seq, step, epoch, workers, *evicted = rest
        return Expired(live, left_ms, Ended(seq, step, epoch, evicted, list(json.loads(workers))))

    async def workers(self) -> list[WorkerStatus]:
        """The live workers, by name."""
        scripts = self._scripts
        with reachable():
            newest: dict[str, str] = await scripts.store.client.hgetall(scripts.key("workers"))
            pipeline = scripts.store.client.pipeline(transaction=False)
            for lease in newest.values():
                pipeline.hgetall(scripts.lease_key(lease))
                pipeline.pttl(scripts.lease_key(lease))
            pipeline.hgetall(scripts.key("group"))
            pipeline.hget(scripts.key("run"), "outliers")
            *answers, gathered, counts = await pipeline.execute()
        outliers = json.loads(counts or "{}")
        live = []
        for (worker, lease), fields, ttl in zip(newest.items(), answers[::2], answers[1::2], strict=True):
            if fields and ttl > 0:
                status = {**fields, "worker": worker, "lease": lease, "expires_in_ms": ttl}
                counted = {"gathered": gathered.get(worker, 0), "outliers": outliers.get(worker, 0)}
                live.append(WorkerStatus.model_validate({**status, **counted}))
        return sorted(live, key=lambda status: status.worker)

    async def newest_lease(self, worker: str) -> str:
        """A worker's, empty if it has none."""
        with reachable():
            return await self._scripts.store.client.hget(self._scripts.key("workers"), worker) or ""
