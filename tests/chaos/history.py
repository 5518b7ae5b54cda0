"""The history of a run under faults: a line of JSON for each thing that a client did, or learned.

A line is written before what it announces is sent, and outlives its writer: who is killed has said what it had begun.
Times are of the one monotonic clock of the machine, so lines of several processes can be put in order.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

__all__ = [
    "Admitted",
    "Attempt",
    "Change",
    "Claimed",
    "DataLook",
    "Grant",
    "History",
    "Pull",
    "Push",
    "Receipt",
    "Recorder",
    "as_ranges",
    "from_ranges",
    "read",
]

Line = Mapping[str, Any]

NEVER = 1 << 62
"""The time of an answer that has not come."""


class Recorder:
    """Appends lines to a file; safe in several threads, and whatever kills the process."""

    def __init__(self, path: Path, who: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._who = who
        self._ids = count()

    def write(self, kind: str, **members: Any) -> None:
        line = {"kind": kind, "at": time.monotonic_ns(), "who": self._who, **members}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def begin(self, kind: str, **members: Any) -> str:
        """Writes the beginning of a call, and returns the name under which its end is to be written."""
        call = f"{self._who}/{next(self._ids)}"
        self.write(kind, id=call, **members)
        return call


@dataclass(frozen=True)
class Receipt:
    """What a push was answered with; `update`: the step whose weights have it, None if it was dropped."""

    decision: str
    step: int
    staleness: int
    replayed: bool

    @property
    def update(self) -> int | None:
        return {"applied": self.step, "accumulated": self.step + 1, "dropped": None}[self.decision]


@dataclass
class Attempt:
    """One request that carried a push, or a part of it: when it was sent, and how it ended.

    end: `receipt`, `refused` (for good: it has changed nothing), or `unknown`.
    """

    sent: int
    part: int | None = None
    answered: int = NEVER
    end: str = "unknown"
    reason: str = ""
    receipt: Receipt | None = None


@dataclass
class Push:
    """A push, known by its coordinate: every gradient has a single element that is not zero, and each its own.

    token, epoch: of the lease that it was made under. taken_at: the step of its gradient.
    """

    coordinate: int
    worker: str
    token: int
    epoch: int
    taken_at: int
    units: tuple[int, ...] = ()
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def began(self) -> int:
        return min(attempt.sent for attempt in self.attempts)

    @property
    def receipts(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.receipt is not None]

    @property
    def receipt(self) -> Receipt | None:
        """The first one; others have to agree with it."""
        return next((attempt.receipt for attempt in self.attempts if attempt.receipt is not None), None)

    @property
    def is_refused(self) -> bool:
        """Whether every attempt was refused for good."""
        return all(attempt.end == "refused" for attempt in self.attempts)


@dataclass(frozen=True)
class Grant:
    """A lease that a worker was granted."""

    worker: str
    token: int
    epoch: int
    step: int
    asked: int
    answered: int


@dataclass(frozen=True)
class Admitted:
    """A push that the owner of a shard admitted, under its ownership's token."""

    shard: int
    token: int
    asked: int
    answered: int


@dataclass(frozen=True)
class Change:
    """A learning rate that was set. answered: when the service had said that it is in force; else it may come yet."""

    lr: float
    asked: int
    answered: int = NEVER


@dataclass(frozen=True)
class Claimed:
    """Units that a lease was handed out."""

    token: int
    units: tuple[int, ...]
    asked: int
    answered: int


@dataclass(frozen=True)
class DataLook:
    """How the run's data set stood at a step, when nothing moved.

    units: of a pass. passes_done: how many. passes: of those begun and not done, how many units had counted.
    """

    epoch: int
    step: int
    units: int
    passes_done: int
    passes: Mapping[int, int]


@dataclass(frozen=True)
class Pull:
    """Weights that were served: for each coordinate that is not zero, its values in the run's tensors."""

    reader: str
    epoch: int
    step: int
    values: Mapping[int, tuple[float, ...]]
    asked: int
    answered: int


@dataclass
class History:
    """What clients know of a run.

    durable: epoch, step, and when the service had said that a checkpoint has it. faults: what was done to the system.
    seen: what processes of the service noted of themselves. stuck: what never came to an end. taken_back: from when to
    when changes of Redis were lost, as by a failover to a replica that lags, and when that was over.
    """

    pushes: dict[int, Push] = field(default_factory=dict)
    grants: list[Grant] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    durable: list[tuple[int, int, int]] = field(default_factory=list)
    faults: list[Line] = field(default_factory=list)
    seen: list[Line] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    claims: list[Claimed] = field(default_factory=list)
    looks: list[DataLook] = field(default_factory=list)
    admissions: list[Admitted] = field(default_factory=list)
    taken_back: list[tuple[int, int]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=lambda: [Change(1.0, -2, -1)])
    """The rates that were set, and before them the one that the run began with."""

    def rates(self, began: int, ended: int) -> set[float]:
        """The learning rates that may have been in force between two moments."""
        return {
            each.lr
            for each in self.changes
            if each.asked < ended
            and not any(each.answered < later.asked and later.answered < began for later in self.changes)
        }

    def may_be_forgotten(self, call: Grant | Claimed) -> bool:
        """Whether Redis may have lost what a call changed: leases, and who has which units, are kept there alone."""
        return any(call.asked < ended and began < call.answered for began, ended in self.taken_back)

    @classmethod
    def of(cls, lines: Iterable[Line]) -> History:
        """The history that lines in any order tell."""
        history, begun, attempts = cls(), {}, {}
        changed: dict[str, int] = {}
        for line in sorted(lines, key=lambda line: line["at"]):
            match line["kind"]:
                case "ask" | "pulling" | "claiming" | "admitting" | "taking-back" | "changing":
                    begun[line["id"]] = line
                case "send":
                    attempts[line["id"]] = history._sent(line)
                case "receipt" | "refused" | "unknown":
                    _end(attempts[line["id"]], line)
                case "granted":
                    asked = begun[line["id"]]
                    lease = (line[name] for name in ("token", "epoch", "step"))
                    history.grants.append(Grant(asked["worker"], *lease, asked["at"], line["at"]))
                case "pulled":
                    values = {int(index): tuple(each) for index, each in line["odd"].items()}
                    values |= dict.fromkeys(from_ranges(line["whole"]), tuple(line["value"]))
                    place = line["who"], line["epoch"], line["step"], values
                    history.pulls.append(Pull(*place, begun[line["id"]]["at"], line["at"]))
                case "durable":
                    history.durable.append((line["epoch"], line["step"], line["at"]))
                case "fault":
                    history.faults.append(line)
                case "seen":
                    history.seen.append(line)
                case "taken-back":
                    history.taken_back.append((begun[line["id"]]["at"], line["at"]))
                case "changed":
                    changed[line["id"]] = line["at"]
                case "stuck":
                    history.stuck.append(line["what"])
                case "admitted":
                    asked = begun[line["id"]]
                    history.admissions.append(Admitted(asked["shard"], asked["token"], asked["at"], line["at"]))
                case "claimed":
                    asked = begun[line["id"]]
                    history.claims.append(Claimed(asked["token"], tuple(line["units"]), asked["at"], line["at"]))
                case "data":
                    place = line["epoch"], line["step"], line["units"], line["passes_done"]
                    history.looks.append(DataLook(*place, {of_pass: done for of_pass, done in line["passes"]}))
        for call, asked in begun.items():
            if asked["kind"] == "changing":
                history.changes.append(Change(asked["lr"], asked["at"], changed.get(call, NEVER)))
        return history

    def _sent(self, line: Line) -> Attempt:
        coordinate = line["coordinate"]
        if coordinate not in self.pushes:
            claim = (line[name] for name in ("worker", "token", "epoch", "taken_at"))
            self.pushes[coordinate] = Push(coordinate, *claim, tuple(line.get("units", ())))
        attempt = Attempt(line["at"], line.get("part"))
        self.pushes[coordinate].attempts.append(attempt)
        return attempt


def _end(attempt: Attempt, line: Line) -> None:
    attempt.answered, attempt.end, attempt.reason = line["at"], line["kind"], line.get("reason", "")
    if line["kind"] == "receipt":
        attempt.receipt = Receipt(*(line[name] for name in ("decision", "step", "staleness", "replayed")))


def read(folder: Path) -> Iterator[Line]:
    """The lines of all files of a folder. The last one of a process that was killed may be torn."""
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().split("\n")[:-1]:
            yield json.loads(text)


def as_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers as [first, last] of each stretch."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def from_ranges(ranges: Iterable[Iterable[int]]) -> Iterator[int]:
    for first, last in ranges:
        yield from range(first, last + 1)
