"""What has been changed of a run while it trains, as a function of its log: as shards, checkpoints and Redis hold it.

An entry of the log that changes the spec holds all that is changed from there on, and not the difference: what is in
force is what the newest of them says. Beside it stands how the run is operated, whether it is paused and who gets no
lease, which a run keeps that goes back to a checkpoint. An entry that refuses a worker leases names that worker, and
the time by which it is told who is refused none any more: so nobody is remembered for longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from freestep.api.control import ControlRequest, RunControl, changed, in_force
from freestep.api.models import RunSpec
from freestep.errors import IdempotencyConflict

__all__ = ["Control", "ControlChange", "Orders"]

_REMEMBERED = 64
"""Idempotency keys of the newest changes."""


@dataclass(frozen=True)
class Orders:
    """What an operator has said of how a run goes on, which is no part of what it computes.

    suspended: worker -> when it may have a lease again, in ms since 1970 by Redis's clock.
    """

    paused: bool = False
    suspended: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> Orders:
        """As the run's hash in Redis has it."""
        return cls(fields.get("paused") == "1", json.loads(fields.get("suspended") or "{}"))

    def to_json(self) -> dict[str, Any]:
        return {"paused": self.paused, "suspended": dict(self.suspended)}


@dataclass(frozen=True)
class Control:
    """What is changed of a run as of a place in its log.

    optimizer, groups, aggregation: the fields that differ from its spec, as `RunControl` has them.
    answered: idempotency key -> digest of the request that it came with, of the newest changes, oldest first.
    """

    optimizer: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aggregation: Mapping[str, Any] = field(default_factory=dict)
    answered: Mapping[str, str] = field(default_factory=dict)
    orders: Orders = field(default_factory=Orders)

    def __bool__(self) -> bool:
        return self != NOTHING_CHANGED

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> Control:
        """As the run's hash in Redis has it; nothing is changed where that has nothing."""
        return cls.parse(fields.get("control", ""), Orders.of(fields))

    @classmethod
    def parse(cls, text: str, orders: Orders) -> Control:
        """Of `text` and of the run's orders."""
        return cls(**json.loads(text or "{}"), orders=orders)

    @property
    def text(self) -> str:
        """All but its orders; empty where nothing of it was changed."""
        members = {
            "optimizer": dict(self.optimizer),
            "groups": {name: dict(own) for name, own in self.groups.items()},
            "aggregation": dict(self.aggregation),
            "answered": dict(self.answered),
        }
        return json.dumps(members) if any(members.values()) else ""

    def members(self) -> dict[str, Any]:
        """As a member of a checkpoint's manifest; none where nothing is changed."""
        return {"control": {"text": self.text, **self.orders.to_json()}} if self else {}

    @classmethod
    def of_member(cls, member: Mapping[str, Any]) -> Control:
        """Of that member. Raises TypeError and ValueError for another."""
        if not member:
            return NOTHING_CHANGED
        return cls.parse(member["text"], Orders(bool(member["paused"]), dict(member["suspended"])))

    def as_seen(self, now_ms: int = 0) -> RunControl:
        """As the run's status shows it. now_ms: by Redis's clock; without it no suspended worker is shown."""
        left = {worker: until - now_ms for worker, until in self.orders.suspended.items()}
        return RunControl(
            optimizer=dict(self.optimizer),
            groups={name: dict(own) for name, own in self.groups.items()},
            aggregation=dict(self.aggregation),
            paused=self.orders.paused,
            suspended={worker: ms for worker, ms in left.items() if now_ms and ms > 0},
        )

    @classmethod
    def seen(cls, shown: RunControl) -> Control:
        """What `as_seen` has shown of the spec's fields."""
        return cls(shown.optimizer, shown.groups, shown.aggregation)

    def in_force(self, spec: RunSpec) -> RunSpec:
        """The run's spec with what is changed. Raises ValidationError."""
        return in_force(spec, self.as_seen())

    def after(self, spec: RunSpec, wish: ControlRequest, key: str) -> Control:
        """What is changed after a request. key: its idempotency key, empty if it has none.

        Equal to this where there is nothing to change, or the request has changed it before. Raises
        IdempotencyConflict, and ValidationError for what cannot be changed.
        """
        asked = _digest(wish)
        if (before := self.answered.get(key)) is not None:
            if before != asked:
                raise IdempotencyConflict("the idempotency key came before with another change")
            return self
        after = changed(spec, self.as_seen(), wish)
        made = replace(Control.seen(after), answered=self.answered, orders=replace(self.orders, paused=after.paused))
        if made == self or not key:
            return made
        answered = [*self.answered.items(), (key, asked)][-_REMEMBERED:]
        return replace(made, answered=dict(answered))

    def under(self, orders: Orders) -> Control:
        """The same, under other orders."""
        return replace(self, orders=orders)


NOTHING_CHANGED = Control()


def _digest(wish: ControlRequest) -> str:
    text = json.dumps(wish.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ControlChange:
    """A change as an entry of the log has it: of the spec and of whether the run is paused, or of a worker.

    control: what is changed from here on; None where a worker is suspended. worker, until_ms: who gets no lease, and
    until when. at_ms: when that was said; both in ms since 1970 by Redis's clock. asked: the request, JSON. by: the
    name of the token that asked for it.
    """

    control: Control | None
    asked: str
    by: str
    worker: str = ""
    until_ms: int = 0
    at_ms: int = 0

    @classmethod
    def of(cls, member: Mapping[str, Any]) -> ControlChange:
        """Of the entry's member, as lua/change_run.lua and lua/end_worker.lua write it."""
        if "worker" in member:
            until, at = int(member["until"]), int(member["at"])
            return cls(None, member["asked"], member["by"], member["worker"], until, at)
        control = Control.parse(member["text"], Orders(member["paused"] == "1"))
        return cls(control, member["asked"], member["by"])

    def after(self, before: Control) -> Control:
        """What is changed of the run once the entry is taken."""
        orders = before.orders
        if self.control is None:
            named = {**orders.suspended, self.worker: self.until_ms}
            left = {worker: until for worker, until in named.items() if until > self.at_ms}
            return before.under(replace(orders, suspended=left))
        return self.control.under(replace(orders, paused=self.control.orders.paused))
