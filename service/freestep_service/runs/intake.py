"""The way of a push's body into memory: its sender's lane, a vector, the journal's copy, the bytes, and their check.

The law of this file: it knows bodies and memory, and decides nothing. What was taken for a body that does not come, or
is refused, is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf

from freestep.errors import NonFiniteGradient
from freestep_service.domain.aggregation import accepted_encodings
from freestep_service.domain.records import Claim, LogPosition
from freestep_service.runs.lanes import Lanes
from freestep_service.runs.shard_core import ShardCore
from freestep_service.state.buffers import Vector
from freestep_service.state.push_entry import require_usable
from freestep_service.state.staging import Body, Staged
from freestep_service.storage.journal_parts import PartWriter

__all__ = ["Intake", "Room"]


class Intake:
    """The memory of one shard for the bodies of pushes."""

    def __init__(self, core: ShardCore) -> None:
        self._core = core
        self._lanes = Lanes(self._most)

    @property
    def _most(self) -> float:
        """How many bodies of a lease may come at once."""
        # With several shards, Redis gives the turns: pushes that took them here would wait for each other.
        return inf if self._core.is_sharded else max(1, self._core.staging.pool.capacity // 2)

    async def room(
        self, claim: Claim, length: int, deadline: float, turn: Callable[[], Awaitable[None]] | None = None
    ) -> Room:
        """Room for the body of `length` bytes that a claim is for, which whoever has it receives into or gives back.

        deadline: by the event loop's clock. turn: returns when memory may be asked for, which others have until then.
        Raises Overloaded past the deadline, StorageUnavailable where the journal cannot take the body by then, and what
        `turn` raises.
        """
        loop, pool = asyncio.get_running_loop(), self._core.staging.pool
        self._lanes.most = self._most
        await self._lanes.enter(claim.lease, max(deadline - loop.time(), 0.0))
        try:
            if turn is not None:
                await turn()
            vector = await pool.acquire(max(deadline - loop.time(), 0.0))
            try:
                journal = self._core.journal
                copy = await journal.part(claim, length, max(deadline - loop.time(), 0.0)) if journal else None
            except BaseException:
                pool.release(vector)
                raise
        except BaseException:
            self._lanes.leave(claim.lease)
            raise
        return Room(self, claim, vector, copy)

    def forget(self, claim: Claim) -> None:
        """Has the journal forget the body of a push that has not counted."""
        if self._core.journal is not None:
            self._core.journal.forget(claim.key)

    def give_up(self, claim: Claim, place: LogPosition) -> None:
        """Has the journal keep a body only while another shard may turn out to know its push.

        place: where the log stood when Redis did not know it.
        """
        if self._core.journal is not None:
            self._core.journal.give_up(claim.key, place)


class Room:
    """Room for one body; see `Intake.room`.

    copy: where the journal has the body from.
    """

    def __init__(self, intake: Intake, claim: Claim, vector: Vector, copy: PartWriter | None) -> None:
        self._intake = intake
        self._claim = claim
        self._vector = vector
        self._copy = copy

    def give_back(self) -> None:
        """No body comes."""
        self._intake._core.staging.pool.release(self._vector)
        if self._copy is not None:
            self._copy.abandon()
        self._intake._lanes.leave(self._claim.lease)

    async def receive(self, body: Body, on_slow: Callable[[], None] = lambda: None) -> Staged:
        """Receives the body, whose memory the caller has from then on.

        on_slow: called once when the memory is counted with that of slow peers. Raises what `Staging.receive` raises,
        and NonFiniteGradient.
        """
        core = self._intake._core
        spec = core.shard.spec
        try:
            encodings = accepted_encodings(spec.aggregation)
            staged = await core.staging.receive(body, self._vector, encodings, on_slow, self._copy)
        finally:
            self._intake._lanes.leave(self._claim.lease)
        try:
            require_usable(spec, staged.norm)
        except NonFiniteGradient:
            staged.hold.release()
            self._intake.forget(self._claim)
            raise
        return staged
