"""A run in a real Redis, driven through its Coordinator, one call after another and without a service."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from redis import Redis

from freestep.api.models import Lease
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.norm_history import Norm, NormHistory
from freestep_service.domain.opening import Report
from freestep_service.domain.records import (
    Admission,
    CheckpointId,
    Claim,
    LogPosition,
    Owner,
    Record,
    RunState,
    StagedPart,
)
from freestep_service.domain.run_view import RunView

__all__ = ["ASYNC", "HOUR", "DrivenRun", "Driver", "norms_of"]

T = TypeVar("T")

HOUR = 3_600_000
"""In ms: no lease of a test runs out by itself."""
ASYNC = Policy("1", "none", distinct=False)


class Driver:
    """A connection to a server, and the event loop on which it is used."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = Redis.from_url(url, decode_responses=True)
        self.raw = Redis.from_url(url)
        """For what is no text."""
        self._runner = asyncio.Runner()
        self.store = self.do(Store.connect(url))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end."""

        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await work

        return self._runner.run(bounded())

    def close(self) -> None:
        self.do(self.store.close())
        self._runner.close()
        self.redis.close()
        self.raw.close()


class DrivenRun:
    """A run of the test's own. Every call takes the run's present epoch and position unless it is given others."""

    def __init__(self, driver: Driver, shards: int = 1, policy: Policy = ASYNC) -> None:
        self.driver = driver
        self.redis = driver.redis
        self.do = driver.do
        self.name = uuid.uuid4().hex
        self.shards = shards
        self.coordinator = Coordinator(driver.store, self.name, "{}", policy)
        self.opening, self.leases = self.coordinator.opening, self.coordinator.leases
        self.pushes, self.log = self.coordinator.pushes, self.coordinator.log
        self.node = Node("http://127.0.0.1:1", HOUR)
        self.position = LogPosition(1, 0)
        self.attempts: dict[tuple[str, int], str] = {}
        """What a shard was last told of a key by its admission."""

    def key(self, name: str) -> str:
        return f"freestep:{{{self.name}}}:{name}"

    def field(self, name: str) -> str | None:
        """A field of the run's hash."""
        return self.redis.hget(self.key("run"), name)  # type: ignore[return-value]

    def number(self, name: str) -> int:
        """A number of the run's hash, 0 if there is none."""
        return int(self.field(name) or 0)

    def shard_field(self, shard: int, name: str) -> str | None:
        return self.redis.hget(self.key("shards"), f"{shard}:{name}")  # type: ignore[return-value]

    def receipts(self) -> dict[str, Record]:
        """The receipts by key, without the mark of their hash."""
        kept: Any = self.redis.hgetall(self.key("receipts"))
        return {key: Record.from_json(text) for key, text in kept.items() if key}

    def entries(self) -> list[dict[str, Any]]:
        """All of the log."""
        entries: Any = self.redis.xrange(self.key("log"))
        return [json.loads(fields["entry"]) for _, fields in entries]

    def dump(self) -> dict[str, Any]:
        """Every key of the run with what it holds."""
        read = {
            "hash": self.redis.hgetall,
            "list": lambda key: self.redis.lrange(key, 0, -1),
            "stream": self.redis.xrange,
            "zset": lambda key: self.redis.zrange(key, 0, -1, withscores=True),
            "string": self.redis.get,
        }
        return {key: read[str(self.redis.type(key))](key) for key in sorted(self.redis.scan_iter(self.key("*")))}

    # Opening

    def heartbeat(self, node: Node | None = None, *wanted: int, **fields: str) -> RunView | None:
        return self.do(self.opening.heartbeat(node or self.node, wanted, fields))

    def owner(self, shard: int = 0) -> Owner:
        return Owner(shard, self.shard_field(shard, "token") or "", self.position)

    def open(self, *, initialized: bool = True, epoch: int = 1) -> DrivenRun:
        """Creates the run, owns all of its shards and opens it; returns it."""
        assert self.do(self.opening.create(epoch, self.shards)) == "created"
        self.take_all()
        self.reopen(RunState(epoch, initialized=initialized))
        return self

    def take_all(self) -> None:
        self.heartbeat(None, *range(self.shards))

    def reopen(self, state: RunState) -> None:
        """Takes the gathered run through the phases of its opening, to a state."""
        generation = self.number("generation")
        report = Report(state.epoch, state.initialized, CheckpointId(state.epoch, state.step, state.seq)).to_json()
        reports = [
            self.do(self.opening.report_shard(self.owner(shard), generation, report)) for shard in range(self.shards)
        ]
        assert reports == [None] * (self.shards - 1) + [[report] * self.shards]
        target = {"cut": [state.epoch, state.step, state.seq], "live": True}
        assert self.do(self.opening.open(state, self.shards, generation, target))
        self.position = LogPosition(state.epoch, state.seq)
        loaded = [
            self.do(self.opening.loaded(self.owner(shard), self.number("generation"))) for shard in range(self.shards)
        ]
        assert loaded == ["waiting"] * (self.shards - 1) + ["open"]

    def view(self) -> RunView:
        view = self.do(self.opening.read())
        assert view is not None
        return view

    # Leases and pushes

    def grant(self, worker: str = "w", ttl_ms: int = HOUR) -> Lease:
        return self.do(self.leases.grant(worker, ttl_ms))[0]

    def claim(self, lease: Lease, key: str, step: int = 0) -> Claim:
        return Claim(lease.lease, lease.token, step, key)

    def part(self, shard: int = 0, digest: str = "", norm: float = 1.0) -> StagedPart:
        """Ten elements a shard, of four bytes."""
        return StagedPart(10 * shard, 10 * shard + 10, digest or f"digest-{shard}", norm, 40)

    def admit(self, claim: Claim, shard: int = 0) -> Any:
        admission = self.do(self.pushes.admit(claim, self.owner(shard)))
        self.attempts[claim.key, shard] = admission.attempt
        return admission

    def attempt(self, claim: Claim, shard: int = 0) -> str:
        """The attempt that a shard takes its part of a push to be of."""
        return self.attempts.get((claim.key, shard), "")

    def is_admitted(self, claim: Claim, shard: int = 0) -> bool:
        """Admits a push; whether its body may be sent at once."""
        return self.admit(claim, shard) == Admission(attempt=self.attempt(claim, shard))

    def commit(
        self, claim: Claim, shard: int = 0, largest_norm: float | None = None, norm: float = 1.0
    ) -> Record | None:
        answer = self.commit_part(claim, shard, self.part(shard, norm=norm), largest_norm)
        return None if answer is None else answer[0]

    def commit_part(
        self, claim: Claim, shard: int, part: StagedPart, largest_norm: float | None = None, wanted: str = ""
    ) -> tuple[Record, list[str]] | None:
        attempt = self.attempt(claim, shard)
        return self.do(self.pushes.commit(claim, self.owner(shard), part, largest_norm, attempt, wanted))

    def discard(self, claim: Claim, shard: int = 0, slug: str = "", detail: str = "") -> None:
        self.do(self.pushes.discard(claim, self.attempt(claim, shard), shard, slug, detail))

    def push_at_once(self, claim: Claim, largest_norm: float | None = None, norm: float = 1.0) -> Record:
        """Admits and commits a push of the only shard in one call."""
        generation = self.number("generation")
        record, _, _ = self.do(self.pushes.push(claim, self.owner(), self.part(norm=norm), largest_norm, generation))
        return record

    def push(self, claim: Claim) -> Record:
        """Admits and commits a push on all shards."""
        for shard in range(self.shards):
            self.admit(claim, shard)
        for shard in range(self.shards):
            record = self.commit(claim, shard)
        assert record is not None
        return record

    def remembered_norms(self) -> NormHistory:
        """What Redis remembers of the pushes' norms."""
        norms, *counts = (self.field(name) for name in ("norms", "outliers", "banned"))
        return NormHistory.of(json.loads(norms or "[]"), *(json.loads(each or "{}") for each in counts))

    # Time

    def pass_time(self, ms: int) -> None:
        """Has so many ms pass: takes them off every instant that is kept of the run."""
        for worker, ends in self.redis.zrange(self.key("leases"), 0, -1, withscores=True):
            self.redis.zadd(self.key("leases"), {worker: ends - ms})
        for key in self.redis.scan_iter(self.key("lease:*")):
            left: Any = self.redis.pttl(key)
            if left > ms:
                self.redis.pexpire(key, left - ms)
            else:
                self.redis.delete(key)
        shards: Any = self.redis.hgetall(self.key("shards"))
        for field, value in shards.items():
            if field.endswith(":ends"):
                self.redis.hset(self.key("shards"), field, int(value) - ms)
        staged: Any = self.redis.hgetall(self.key("staged"))
        for push, value in staged.items():
            kept = json.loads(value)
            passed = {name: kept[name] - ms for name in ("at", "asked") if name in kept}
            self.redis.hset(self.key("staged"), push, json.dumps(kept | passed))

    def expire(self, patience_ms: int = HOUR) -> Any:
        return self.do(self.leases.expire(self.position, patience_ms))


def norms_of(entries: Iterable[Mapping[str, Any]], ban_after: int | None = None) -> NormHistory:
    """What shards remember of the pushes' norms after these entries of the log."""
    history = NormHistory()
    for entry in entries:
        if "record" in entry:
            record = Record.from_json(entry["record"])
            history = history.after(Norm(record.worker, float(record.norm), record.is_outlier), ban_after)
    return history
