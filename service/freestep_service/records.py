"""What passes between coordinator, pushes and shard: claims, decisions, and what is known of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from freestep.models import Receipt

__all__ = ["Admission", "Behind", "Claim", "Ended", "Known", "Lost", "Pending", "Record", "RunState"]


class Behind(Exception):
    """Redis has lost what the shard has seen; the run must be opened again."""


class Lost(Exception):
    """The run was opened again since the push was admitted, which is thereby forgotten."""


class Pending(Exception):
    """The push's key is on its way through another request."""


class Known(NamedTuple):
    """How much of the log a shard has heard of. A Redis that has not got that far has lost data."""

    epoch: int
    seq: int


@dataclass(frozen=True)
class Claim:
    """What a push says of itself: its lease and token, where its gradient was taken, its idempotency key."""

    lease: str
    token: int
    step: int
    key: str
    length: int
    """Bytes of its body."""
    samples: float | None = None

    def fingerprint(self) -> str:
        """What must be the same when the key comes again; it begins with the lease, see lua/open.lua."""
        return f"{self.lease} {self.token} {self.step} {self.length} {self.samples}"


@dataclass(frozen=True)
class Record:
    """A decided push, as kept for its idempotency key. `seq` is its place in the log, 0 if it has none."""

    claim: str
    digest: str
    decision: str
    step: int
    staleness: int
    seq: int
    live: int
    worker: str
    epoch: int
    reason: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Record:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

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


@dataclass(frozen=True)
class RunState:
    """What a shard knows of its run, enough to write the run's part of Redis anew."""

    epoch: int
    step: int = 0
    seq: int = 0
    initialized: bool = False
    group: Mapping[str, int] = field(default_factory=dict)
    """Worker -> its pushes in the update being gathered."""
    receipts: Mapping[str, Record] = field(default_factory=dict)
    """Idempotency key -> record, oldest first."""


@dataclass(frozen=True)
class Admission:
    """What the claim decided: nothing yet (no record), or all of it."""

    record: Record | None = None
    replayed: bool = False
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """What became of a run when leases ended; `seq` is 0 unless that closed an update."""

    seq: int
    step: int
    epoch: int
    evicted: list[str]
