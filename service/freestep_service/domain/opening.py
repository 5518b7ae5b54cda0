"""How a closed run goes on: the reports of its shards, and the decision that follows from them.

A run opens when every shard has an owner and each owner has reported what it has: the state in its memory, the place at
which an orderly shutdown left the shard, the checkpoints that it can read. A durable checkpoint is never given up
because no owner can read a part of it: the run waits instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from freestep_service.domain.records import CheckpointId, LogPosition
from freestep_service.domain.run_view import RunView

__all__ = ["Decision", "Exchange", "Report", "Waiting", "common_checkpoint", "decide", "exchange"]

_ROUNDS = 2
"""How often shards report their journals' entries: once for the others to take them, and once with those taken."""


@dataclass(frozen=True)
class Report:
    """What the owner of a shard reports of it.

    epoch: the newest that the owner knows of. initialized: whether the shard has weights.
    live: the state that the owner holds in memory. closed: where an orderly shutdown left the shard, if it holds none.
    offers: the checkpoints that the owner can load the shard from, oldest first.
    """

    epoch: int
    initialized: bool = False
    live: CheckpointId | None = None
    closed: LogPosition | None = None
    offers: Sequence[CheckpointId] = field(default_factory=tuple)
    problem: str | None = None
    """Why the state could not be written, where the run was to be divided anew."""
    journaled: bool = False
    """Whether the state holds all that was acknowledged, so that a Redis which knows of more was not."""
    repaired: bool = False
    """Whether a repair of its journal has given up entries that were acknowledged."""
    entries: Sequence[dict[str, Any]] = field(default_factory=tuple)
    """Entries of the shard's journal that other shards may lack, where they were asked for."""

    @classmethod
    def from_json(cls, text: str) -> Report:
        members: dict[str, Any] = json.loads(text)
        live, closed = members["live"], members["closed"]
        return cls(
            members["epoch"],
            members["initialized"],
            None if live is None else CheckpointId(*live),
            None if closed is None else LogPosition(*closed),
            [CheckpointId(*offer) for offer in members["offers"]],
            members.get("problem"),
            members.get("journaled", False),
            members.get("repaired", False),
            members.get("entries", ()),
        )

    def to_json(self) -> str:
        offers = [list(offer) for offer in self.offers]
        return json.dumps(
            {
                "epoch": self.epoch,
                "initialized": self.initialized,
                "live": self.live,
                "closed": self.closed,
                "offers": offers,
                "problem": self.problem,
                "journaled": self.journaled,
                "repaired": self.repaired,
                "entries": list(self.entries),
            }
        )

    @property
    def place(self) -> CheckpointId | None:
        """The newest state that the shard has, in memory or on disk."""
        if self.live is not None or self.closed is None:
            return self.live
        return next((offer for offer in self.offers if (offer.epoch, offer.seq) == self.closed), None)


@dataclass(frozen=True)
class Decision:
    """The state that the shards load, as of a place in the log; None: a run without weights.

    live: shards that hold that state in memory keep it. upload: the import that the state is, where it is no
    checkpoint. attempt: the request of that import whose parts the owners hold. digest: of its body.
    """

    epoch: int
    cut: CheckpointId | None
    initialized: bool
    live: bool = False
    upload: str = ""
    attempt: str = ""
    digest: str = ""

    def target(self) -> dict[str, Any]:
        """The decision as lua/open.lua keeps it."""
        # Version 0.1.0 looks for its parts under `upload`.
        upload = {"upload": self.attempt, "import": self.upload, "digest": self.digest} if self.upload else {}
        return {"cut": self.cut, "live": self.live, **upload}


class Exchange(NamedTuple):
    """What shards are to report of their journals: in which round, and the entries behind which one.

    After the rounds in which they take what they lack, there is one in which they go back to that entry, the newest
    that all have, where a repair has given up others.
    """

    round: int
    seq: int

    @classmethod
    def of(cls, standing: RunView) -> Exchange | None:
        """None where nothing was asked for."""
        asked = standing.run.get("exchange")
        return None if asked is None else cls(*map(int, asked.split()))

    @property
    def goes_back(self) -> bool:
        """Whether it is the last round."""
        return self.round > _ROUNDS


class Waiting(Exception):
    """The run cannot be opened until more is reported; the message says what is missing."""


def common_checkpoint(reports: Sequence[Report]) -> CheckpointId | None:
    """The newest checkpoint that all shards can be loaded from; None where there is none."""
    common = set(reports[0].offers).intersection(*(report.offers for report in reports[1:]))
    return max(common, default=None)


def decide(standing: RunView, reports: Sequence[Report]) -> Decision:
    """Decides what a run goes on from. The epoch changes unless nothing can have been lost. Raises Waiting."""
    known = CheckpointId(standing.number("epoch"), standing.number("step"), standing.number("seq"))
    is_lost, is_recut = "lost" in standing.run, "recut" in standing.run
    newest = max([known.epoch, *(report.epoch for report in reports)])
    newest = max([newest, *(offer.epoch for report in reports for offer in report.offers)])
    places = {report.place for report in reports}
    place = places.pop() if len(places) == 1 else None
    # All shards are at one place, and there is no newer epoch that they missed.
    if place is not None and place.epoch == newest and not is_recut:
        is_there = (known.epoch, known.seq) == (place.epoch, place.seq)
        has_no_more = (known.epoch, known.seq) <= (place.epoch, place.seq)
        # What Redis has beyond journals was acknowledged to nobody.
        has_no_more |= all(report.journaled for report in reports)
        holds_on = all(report.live for report in reports) and has_no_more
        if is_lost or is_there or holds_on:
            initialized = all(report.initialized or report.live is None for report in reports)
            return Decision(place.epoch, place, initialized, live=True)
    # There never was a state to go on from.
    if not any(report.offers or report.initialized for report in reports) and "durable" not in standing.run:
        is_new = not is_lost and not standing.number("initialized") and known.epoch == newest
        return Decision(newest if is_new else newest + 1, None, initialized=False)
    # Shards differ, or what Redis knows of is lost: back to the newest checkpoint that all can load.
    if (checkpoint := common_checkpoint(reports)) is not None:
        return Decision(newest + 1, checkpoint, initialized=True)
    if any(report.offers for report in reports) or "durable" in standing.run:
        raise Waiting("no checkpoint can be read that has all shards in it")
    return Decision(newest + 1, None, initialized=False)


def exchange(standing: RunView, reports: Sequence[Report]) -> Exchange | None:
    """What shards are to report of their journals next; None if that is no help.

    What one shard's journal has of the log is decided: the others have their parts of it on disk, unless a journal was
    repaired.
    """
    places = [report.live for report in reports if report.live is not None and report.journaled]
    if len(places) < len(reports) or len({place.epoch for place in places}) > 1:
        return None
    are_at_one, is_repaired = len(set(places)) == 1, any(report.repaired for report in reports)
    before = Exchange.of(standing) or Exchange(0, 0)
    if before.goes_back or (are_at_one and not is_repaired):
        return None
    return Exchange(_ROUNDS + 1 if are_at_one else before.round + 1, min(place.seq for place in places))
