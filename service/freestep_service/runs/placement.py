"""Which shards of a run are for this process: the free ones that it is to take, and those beyond its share.

The law of this file: it decides, and `ownership` acts. No shard is taken where its checkpoint cannot be read,
nor, while that is waited for, where its journal is not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from freestep_service.coordination.nodes import Stopwatch
from freestep_service.domain.run_view import RunView
from freestep_service.runs.context import RunContext
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.stored_states import StoredStates

__all__ = ["Placement"]

logger = logging.getLogger("freestep")


class Placement:
    """The placement of one run's shards, as this process sees to it."""

    def __init__(self, context: RunContext, shards: OwnedShards, stored: StoredStates) -> None:
        self.problem: str | None = None
        """Why shards without an owner cannot be taken here."""
        self.has_lost_state = False
        """Whether a process with this one's URL was their owner: no other is then expected to have their state."""
        self._context = context
        self._node = context.resources.node
        self._shards = shards
        self._stored = stored
        self._missing_since = Stopwatch(self._node.clock)
        self._surplus_since = Stopwatch(self._node.clock)
        self._is_alone = not context.settings.redis_url
        self._unknown_s = 0.0 if self._is_alone else 2 * self._node.heartbeat_s
        """Seconds after which a Redis that has lost its data knows of all who live: they have had their heartbeats.

        The embedded store has nobody else.
        """

    async def wanted(self, view: RunView) -> list[int]:
        """The shards to take: free ones, up to this process's share, or more if others leave them.

        Not those whose checkpoint, or whose journal, is where this process cannot read it.
        """
        free = {
            index
            for index in range(view.count)
            if not view.is_owned(index)
            or (
                view.field(index, "node") != self._node.id
                and view.was_owned_by_predecessor(index, self._node.url, self._node.host)
            )
        }
        self._missing_since.note(set(free))
        if free:
            await self._node.heartbeat(self._context.resources.store)
        left = self._node.share(view.count) - len(view.owned_by(self._node.id))
        wanted: list[int] = []
        unreadable: dict[int, str] = {}
        # Those whose state is still here come first.
        for index in sorted(free, key=lambda index: (index not in self._shards, index)):
            was_mine = index in self._shards or view.was_owned_by_predecessor(index, self._node.url, self._node.host)
            missing_s = self._missing_since.age(index)
            is_left = was_mine or missing_s > self._node.ttl_ms / 1000
            # Where Redis has lost its data, others hold the state of what seems free.
            waits = "lost" in view.run and (self._node.live_peers > 0 or missing_s < self._unknown_s)
            if not ((left > 0 and not waits) or is_left):
                continue
            reason = None
            if index not in self._shards and "durable" in view.run:
                reason = await self._stored.why_unreadable(index, view.count)
            if index not in self._shards and reason is None:
                reason = await self._stored.why_without_journal(index, view, missing_s)
            if reason is None:
                wanted.append(index)
                left -= 1
            elif is_left or self._is_alone or view.was_owned_at(index, self._node.url):
                unreadable[index] = reason
        self._note_unreadable(view, unreadable)
        return wanted

    def surplus(self, view: RunView) -> list[int]:
        """The shards that this process owns beyond its share, once others have long had room for them."""
        mine = sorted(view.owned_by(self._node.id))
        surplus = mine[self._node.share(view.count) :] if self._context.keeps_checkpoints else []
        self._surplus_since.note({"surplus"} if surplus else set())
        # Beyond the time for which a process that is gone is counted.
        return surplus if self._surplus_since.age("surplus") > 3 * self._node.ttl_ms / 1000 else []

    def _note_unreadable(self, view: RunView, unreadable: Mapping[int, str]) -> None:
        """Notes and logs which shards without an owner cannot be taken, and why."""
        shards: dict[str, list[str]] = {}
        for index, reason in unreadable.items():
            shards.setdefault(reason, []).append(str(index))
        problem = "; ".join(f"shard {', '.join(listed)} has no owner: {reason}" for reason, listed in shards.items())
        if problem and problem != self.problem:
            logger.error("run %s: %s", self._context.name, problem)
        self.problem = problem or None
        self.has_lost_state = any(self._is_alone or view.was_owned_at(index, self._node.url) for index in unreadable)
