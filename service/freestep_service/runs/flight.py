"""A push on its way through one shard: the requests that wait for it, the memory of its body, and its decision.

The law of this file: memory has one owner. A staged vector is the flight's until the log's entry takes it. A key that
was refused may be admitted again, and messages may be late: each is true of the attempt that it names, and of no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from freestep.errors import ProblemError
from freestep_service.domain.records import Claim, Record
from freestep_service.runs.phases import Phases
from freestep_service.state.staging import Staged

__all__ = ["Decision", "Flight"]


@dataclass(frozen=True)
class Decision:
    """A decided push.

    applied: the outcome of its entry on this shard, None where it has none. replayed: the push was decided before.
    """

    record: Record
    applied: asyncio.Future[None] | None
    replayed: bool = False


class Flight:
    """A key that is on its way; requests that send it again wait until it has landed."""

    came_in: int | None = None
    """The generation of the run's opening in which its body came, where that was before its claim was looked at: its
    commit does that then, and counts in no other. None of an admitted push."""

    def __init__(self, claim: Claim, phases: Phases | None = None) -> None:
        self.claim = claim
        self.fingerprint = claim.fingerprint()
        self.phases = phases or Phases()
        self.attempt = ""
        """Of Redis's last admission; empty before the first, and where the run has one shard."""
        self.landed = asyncio.Event()
        self.granted = asyncio.Event()
        """Set when its turn has come to send its body."""
        self.decided: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        """The decision, or the refusal of another shard."""
        self.staged: Staged | None = None
        """The body, until the log's entry takes it."""
        self.commit: asyncio.Task[Decision] | None = None
        self._early: dict[str, list[Callable[[], None]]] = {}
        """What was told of attempts that are not known here: a message may come before the admission's answer."""

    def admitted(self, attempt: str) -> None:
        """Redis has admitted it, perhaps anew: what was told of an earlier attempt is true of it no longer."""
        if attempt == self.attempt:
            return
        if self.attempt:
            self.granted.clear()
            self.decided = asyncio.get_running_loop().create_future()
        self.attempt = attempt
        for tell in self._early.pop(attempt, ()):
            tell()

    def hear(self, attempt: str | None, tell: Callable[[], None]) -> None:
        """Takes a message of an attempt: calls `tell` if it is this one. None is any: older versions named none."""
        if attempt in (None, self.attempt):
            tell()
        else:
            self._early.setdefault(attempt, []).append(tell)

    def decide(self, record: Record, applied: asyncio.Future[None] | None) -> None:
        if not self.decided.done():
            self.decided.set_result(Decision(record, applied))

    def refuse(self, problem: ProblemError) -> None:
        if not self.decided.done():
            self.decided.set_exception(problem)
            # It may come before anybody waits for it.
            self.decided.exception()
        self.granted.set()

    def give_back(self) -> None:
        """Gives back the memory of a push that has no entry in the log."""
        if self.staged is not None:
            self.staged.hold.release()
            self.staged = None
