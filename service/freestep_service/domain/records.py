"""Claims, decisions and positions in the log, as Redis, shards and checkpoints exchange them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from freestep.api.models import Receipt
from freestep_service.domain.control import Control
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.marks import Marks, marks_text, parse_marks
from freestep_service.domain.norm_history import NormHistory
from freestep_service.domain.reports import Reported

__all__ = [
    "OUTLIER",
    "UNKNOWN_ORIGIN",
    "Admission",
    "Ahead",
    "Behind",
    "CheckpointId",
    "Claim",
    "Ended",
    "Fenced",
    "LogPosition",
    "LogTruncated",
    "Lost",
    "Origin",
    "Owner",
    "Pending",
    "Receipts",
    "Record",
    "RunState",
    "StagedPart",
    "UrlInUse",
]


class Ahead(Exception):
    """A push has to wait: its worker is further ahead of the slowest worker than the policy's slack allows."""


class Behind(Exception):
    """Redis has lost log entries that a shard has seen. The run must be opened again."""


class Fenced(Exception):
    """Another process owns the shard. Its calls for the shard change nothing any more."""


class Lost(Exception):
    """An admitted push was forgotten: the run was opened again, or another shard refused the push.

    place: where the log stood when Redis said so; None where the log itself goes on without the push.
    """

    def __init__(self, place: LogPosition | None = None) -> None:
        super().__init__()
        self.place = place


class LogTruncated(Exception):
    """The log lacks entries that a shard has not taken. The run must be opened again."""

    def __init__(self, after: LogPosition, first_seq: int) -> None:
        """first_seq: of the oldest entry after that position which the log still has."""
        super().__init__(f"the log has entries from {first_seq} on, and entry {after.seq + 1} is needed")
        self.first_seq = first_seq


class Pending(Exception):
    """Another request carries a push with the same idempotency key at the moment."""


class UrlInUse(Exception):
    """A live process on another host has the URL of this one."""

    def __init__(self, url: str, host: str, other_host: str) -> None:
        super().__init__(
            f"{url} is the URL of a service on the host {other_host} already, and this one runs on {host}: "
            "set advertise_url to a URL at which the other services reach this one"
        )


class LogPosition(NamedTuple):
    """A position in the log: after entry `seq` of an epoch. Redis has lost data if its log ends before a known one."""

    epoch: int
    seq: int


class Origin(NamedTuple):
    """Where a run began, which tells it from others of its name.

    first_epoch: in which it was created, 0 where that is not known. id: a random word, empty where it is not known.
    creator: the id of the token whose quota it counts against, empty where that has none.
    """

    first_epoch: int = 0
    id: str = ""
    creator: str = ""


UNKNOWN_ORIGIN = Origin()

OUTLIER = "outlier"
"""The reason of a push that counts, and whose norm is that of an outlier."""


class CheckpointId(NamedTuple):
    """The state of a run after entry `seq` of the log of an epoch, when it had reached `step`. Sorts by age."""

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
    """The claim of a push: lease and fencing token, the step at which its gradient was taken, idempotency key.

    samples: the push's weight in a mean. speed: local steps that its worker takes in a second, kept with its lease.
    units: of data sets, that the gradient was taken on.
    """

    lease: str
    token: int
    step: int
    key: str
    samples: float | None = None
    loss: float | None = None
    speed: float | None = None
    units: Marks = field(default_factory=dict, hash=False)

    def fingerprint(self) -> str:
        """What has to be the same when the key comes again.

        It begins with the lease, see lua/open.lua, and ends with the units, if there are any, see lua/_prelude.lua.
        """
        words = f"{self.lease} {self.token} {self.step} {self.samples}"
        return f"{words} {marks_text(self.units)}" if self.units else words


class StagedPart(NamedTuple):
    """A shard's part of a push: elements [begin, end) of the flat gradient, the digest of their bytes, their norm.

    length: of their bytes, as they came.
    """

    begin: int
    end: int
    digest: str
    norm: float
    length: int


@dataclass(frozen=True)
class Record:
    """A decided push, as kept for its idempotency key. `seq` is its place in the log, 0 if it has none.

    Of dropped pushes only those have a place whose norm was not known to be usual.

    digests: of the body, by range of elements ("BEGIN-END"; older versions: by index of the shard).
    norm: of the gradient over all shards, in full precision. bound: the norm that it is clipped to, likewise; None
        where the policy sets none.
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
    bound: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Record:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def digest_of(self, begin: int, end: int) -> str | None:
        """The digest of elements [begin, end) of the body.

        None if it is not known: the body was never read, or it was pushed in other parts, so that bodies cannot be
        compared.
        """
        return self.digests.get(f"{begin}-{end}")

    def settled(self, step: int) -> Record:
        """The record once the run has reached `step`: an accumulated push is applied by then, if the step is later."""
        if self.decision != "accumulated" or step <= self.step:
            return self
        return replace(self, decision="applied", step=self.step + 1)

    @property
    def counted(self) -> Marks:
        """The units of data sets that have counted with the push, see `Claim.fingerprint`."""
        words = self.claim.split(" ", 4)
        return parse_marks(words[4]) if len(words) > 4 and self.decision != "dropped" else {}

    @property
    def is_outlier(self) -> bool:
        """Whether the norm is far beyond the run's usual."""
        return self.reason == OUTLIER

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
    """The decided pushes by idempotency key, oldest first, as Redis holds them too."""

    def remember(self, key: str, record: Record, evicted: Iterable[str]) -> None:
        self[key] = record
        self.forget(evicted)

    def take(self, entry: Mapping[str, Any]) -> None:
        """Remembers the push of an entry of the log, as Redis publishes it, if it is one."""
        if "key" in entry:
            self.remember(entry["key"], Record.from_json(entry["record"]), entry.get("evicted") or ())

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.pop(key, None)

    def until(self, seq: int) -> dict[str, Record]:
        """The records of the log up to an entry, and those of dropped pushes, which have no place in the log."""
        return {key: record for key, record in self.items() if record.seq <= seq}


@dataclass(frozen=True)
class RunState:
    """The state of a run that its part of Redis is written from when the run opens."""

    epoch: int
    step: int = 0
    seq: int = 0
    initialized: bool = False
    group: Mapping[str, int] = field(default_factory=dict)
    """Worker -> number of its pushes in the update that is being gathered."""
    receipts: Mapping[str, Record] = field(default_factory=dict)
    """Idempotency key -> record, oldest first."""
    reported: Reported = field(default_factory=dict)
    pushes: Mapping[str, int] = field(default_factory=dict)
    """Decision -> number of pushes, for a Redis that has lost its counts."""
    norm_history: NormHistory = field(default_factory=NormHistory)
    data: DataSets = field(default_factory=DataSets)
    control: Control = field(default_factory=Control)


@dataclass(frozen=True)
class Admission:
    """The answer to a claim: a record if the claim alone decides the push, else the body may be sent.

    queued: the body has to wait for a message. replayed: the record was known before.
    evicted: idempotency keys whose receipts the record has displaced.
    attempt: a number, as text, that no other admission of the key has: what is said of the push, and told of it, names
        it. Empty where the run has one shard.
    """

    record: Record | None = None
    replayed: bool = False
    evicted: tuple[str, ...] = ()
    queued: bool = False
    attempt: str = ""


@dataclass(frozen=True)
class Ended:
    """What ending leases has changed: `seq` is the place in the log of the update that it completed, 0 if none.

    workers: whose leases have ended.
    """

    seq: int
    step: int
    epoch: int
    evicted: list[str]
    workers: list[str] = field(default_factory=list)
