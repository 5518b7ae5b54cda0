"""How a run stands in Redis, as read at one moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from freestep_service.domain.layout import LAYOUT, NewerLayout
from freestep_service.domain.records import LogPosition, Origin

__all__ = ["DamagedRun", "RunView"]

_RULES = ("spec", "batch", "max_staleness", "distinct", "phase", "generation")
_STATE = ("epoch", "step", "seq", "initialized")
_NUMBERS = (
    "generation",
    "first_epoch",
    *_STATE,
    "shards",
    "resharding",
    "durable_step",
    "applied",
    "accumulated",
    "dropped",
)
_PHASES = ("gather", "load", "open")


class DamagedRun(Exception):
    """What Redis holds of a run lacks fields or has values that cannot be read; the message names them."""


@dataclass(frozen=True)
class RunView:
    """The hash of a run and the hash of its shards, with the fields of lua/_prelude.lua.

    Raises DamagedRun and NewerLayout.

    now_ms: the time of the reading by Redis's clock, in ms since 1970; 0 where it was not read. has_lost_key:
    whether the run lacks one of its keys alone. wrong: what is wrong with keys of it that hold another type.
    """

    run: Mapping[str, str]
    shards: Mapping[str, str]
    now_ms: int
    has_lost_key: bool = False
    wrong: Sequence[str] = ()

    def __post_init__(self) -> None:
        # Older versions wrote no layout.
        if (layout := self.run.get("layout", "1")).isdecimal() and int(layout) > LAYOUT:
            raise NewerLayout(int(layout))
        if faults := list(self._faults()):
            raise DamagedRun(f"the run's part of Redis is damaged: {', '.join(faults)}")

    def _faults(self) -> Iterator[str]:
        # A run that Redis has lost has rules, but no state yet.
        missing = [name for name in (_RULES if "lost" in self.run else _RULES + _STATE) if name not in self.run]
        if self.run.get("phase") == "load" and "target" not in self.run:
            missing.append("target")
        numbers = [name for name in _NUMBERS if not self.run.get(name, "0").isdecimal()]
        if "phase" in self.run and self.phase not in _PHASES:
            yield f"phase is {self.phase!r}"
        if "shards" not in numbers:
            for shard in range(self.count):
                if self.field(shard, "node") is not None:
                    missing += [f"{shard}:{name}" for name in ("token", "ends") if self.field(shard, name) is None]
                if not (self.field(shard, "ends") or "0").isdecimal():
                    numbers.append(f"{shard}:ends")
        yield from (f"{name} is missing" for name in missing)
        yield from (f"{name} is not a number" for name in numbers)

    @property
    def count(self) -> int:
        """The number of shards."""
        return int(self.run.get("shards", 1))

    @property
    def phase(self) -> str:
        """Of the opening: gather, load or open, see lua/open.lua."""
        return self.run["phase"]

    @property
    def generation(self) -> int:
        """Of the opening; it rises with each phase."""
        return int(self.run["generation"])

    @property
    def origin(self) -> Origin:
        """Where the run began; older versions wrote none."""
        return Origin(self.number("first_epoch"), self.run.get("id", ""), self.run.get("creator", ""))

    def number(self, field: str) -> int:
        """A number of the run's hash, 0 if there is none."""
        return int(self.run.get(field, 0))

    def of_generation(self, generation: int) -> RunView:
        """The view, as of the generation that has begun before it was read."""
        return replace(self, run={**self.run, "generation": str(generation)})

    def target(self) -> dict[str, Any]:
        """What shards load, see lua/open.lua."""
        return dict(json.loads(self.run["target"]))

    def field(self, shard: int, field: str) -> str | None:
        """A field that is kept of a shard."""
        return self.shards.get(f"{shard}:{field}")

    def is_owned(self, shard: int) -> bool:
        ends = self.field(shard, "ends")
        return ends is not None and int(ends) > self.now_ms

    @property
    def position(self) -> LogPosition:
        """How much of the log Redis knows."""
        return LogPosition(self.number("epoch"), self.number("seq"))

    def owned_by(self, node: str) -> dict[int, str]:
        """The shards that a process owns, by its id, and their tokens."""
        return {
            shard: self.shards[f"{shard}:token"] for shard in range(self.count) if self.field(shard, "node") == node
        }

    def missing(self) -> list[int]:
        """The shards without an owner."""
        return [shard for shard in range(self.count) if not self.is_owned(shard)]

    def was_owned_at(self, shard: int, url: str) -> bool:
        """Whether the last owner of a shard was a process with this URL, whatever became of it."""
        return url in (self.field(shard, "url"), self.field(shard, "left_url"))

    def was_owned_by_predecessor(self, shard: int, url: str, host: str) -> bool:
        """Whether the shard's last owner is a predecessor of a process with this URL on this host, or that process.

        lua/run_heartbeat.lua hands shards over by the same rule.
        """
        # Older versions wrote no host.
        return self.field(shard, "url") == url and self.field(shard, "host") in (host, None)
