"""What passes between coordinator, pushes and shards: claims, decisions, and what is known of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from freestep.api.models import Receipt
from freestep_service.domain.reports import Reported

__all__ = [
    "Admission",
    "Ahead",
    "Behind",
    "CheckpointId",
    "Claim",
    "Ended",
    "Fenced",
    "LogPosition",
    "Lost",
    "Owner",
    "Pending",
    "Receipts",
    "Record",
    "RunState",
    "RunView",
]


class Ahead(Exception):
    """The push's worker is too far ahead of the slowest one; it has to wait."""


class Behind(Exception):
    """Redis has lost what the shard has seen; the run must be opened again."""


class Fenced(Exception):
    """Another process owns the shard by now; nothing that this one does for it counts."""


class Lost(Exception):
    """The run was opened again since the push was admitted, which is thereby forgotten."""


class Pending(Exception):
    """The push's key is on its way through another request."""


class LogPosition(NamedTuple):
    """How much of the log a shard has heard of. A Redis that has not got that far has lost data."""

    epoch: int
    seq: int


class CheckpointId(NamedTuple):
    """A cut of a run: its state at entry `seq` of the log of `epoch`, when it had reached `step`. They sort by age."""

    epoch: int
    step: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.step}-{self.seq}"


class Owner(NamedTuple):
    """A shard, the fencing token under which a process owns it, and how much of the log that process knows."""

    shard: int
    token: str
    position: LogPosition


@dataclass(frozen=True)
class Claim:
    """What a push says of itself: its lease and token, where its gradient was taken, its idempotency key.

    speed: the steps that its worker takes by itself in a second, which its lease remembers.
    """

    lease: str
    token: int
    step: int
    key: str
    samples: float | None = None
    loss: float | None = None
    speed: float | None = None

    def fingerprint(self) -> str:
        """What must be the same when the key comes again; it begins with the lease, see lua/open.lua."""
        return f"{self.lease} {self.token} {self.step} {self.samples}"


@dataclass(frozen=True)
class Record:
    """A decided push, as kept for its idempotency key. `seq` is its place in the log, 0 if it has none.

    digests: of its body, by shard. norm: of its gradient over all shards, in full precision.
    """

    claim: str
    digests: Mapping[str, str]
    decision: str
    step: int
    staleness: int
    seq: int
    live: int
    worker: str
    epoch: int
    norm: str = "0"
    reason: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Record:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def settled(self, step: int) -> Record:
        """The record of an accumulated push, once the run has reached a step after it: its update is applied."""
        if self.decision != "accumulated" or step <= self.step:
            return self
        return replace(self, decision="applied", step=self.step + 1)

    def receipt(self, *, replayed: bool = False) -> Receipt:
        return Receipt.model_validate(
            {
                "decision": self.decision,
                "reason": self.reason,
                "step": self.step,
                "staleness": self.staleness,
                "replayed": replayed,
            }
        )


class Receipts(dict[str, Record]):
    """The decided pushes by idempotency key, oldest first: the same that Redis holds."""

    def remember(self, key: str, record: Record, evicted: Iterable[str]) -> None:
        self[key] = record
        self.forget(evicted)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.pop(key, None)

    def until(self, seq: int) -> dict[str, Record]:
        """Those of the log up to an entry, and the dropped, which have no place in it."""
        return {key: record for key, record in self.items() if record.seq <= seq}


@dataclass(frozen=True)
class RunState:
    """What is known of a run, enough to write its part of Redis anew."""

    epoch: int
    step: int = 0
    seq: int = 0
    initialized: bool = False
    group: Mapping[str, int] = field(default_factory=dict)
    """Worker -> its pushes in the update being gathered."""
    receipts: Mapping[str, Record] = field(default_factory=dict)
    """Idempotency key -> record, oldest first."""
    reported: Reported = field(default_factory=dict)


@dataclass(frozen=True)
class RunView:
    """How a run stands in Redis: its hash, and the hash of its shards, as lua/_prelude.lua has them."""

    run: Mapping[str, str]
    shards: Mapping[str, str]
    now_ms: int

    @property
    def count(self) -> int:
        """How many shards there are."""
        return int(self.run.get("shards", 1))

    @property
    def phase(self) -> str:
        return self.run["phase"]

    @property
    def generation(self) -> int:
        return int(self.run["generation"])

    def number(self, field: str) -> int:
        """A number of the run's hash, 0 where there is none."""
        return int(self.run.get(field, 0))

    def field(self, shard: int, field: str) -> str | None:
        """What is said of a shard."""
        return self.shards.get(f"{shard}:{field}")

    def is_owned(self, shard: int) -> bool:
        ends = self.field(shard, "ends")
        return ends is not None and int(ends) > self.now_ms

    def missing(self) -> list[int]:
        """The shards that nobody owns."""
        return [shard for shard in range(self.count) if not self.is_owned(shard)]

    def target(self) -> dict[str, Any]:
        """What shards load, see lua/open.lua."""
        return dict(json.loads(self.run["target"]))


@dataclass(frozen=True)
class Admission:
    """What the claim decided: nothing yet (no record), or all of it. `queued`: the body has to wait for its turn."""

    record: Record | None = None
    replayed: bool = False
    evicted: tuple[str, ...] = ()
    queued: bool = False


@dataclass(frozen=True)
class Ended:
    """What became of a run when leases ended; `seq` is 0 unless that closed an update."""

    seq: int
    step: int
    epoch: int
    evicted: list[str]
