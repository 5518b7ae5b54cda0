"""Parts of states that were uploaded, held for a while by the shards' owners until the run opens with them."""

from __future__ import annotations

import asyncio

from freestep_service.state.received_state import ReceivedState
from freestep_service.state.shard import StateCopy

__all__ = ["HeldStates"]

_KEPT_S = 120.0


class HeldStates:
    """The parts of one run's imports, by attempt and shard. Their memory is counted until they are taken or dropped."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], ReceivedState] = {}

    def hold(self, attempt: str, index: int, received: ReceivedState) -> None:
        """Holds a shard's part, in place of one that came before, until it is taken or nobody comes for it."""
        self._drop(attempt, index)
        self._held[attempt, index] = received
        asyncio.get_running_loop().call_later(_KEPT_S, self._expire, attempt, index, received)

    def find(self, attempt: str) -> StateCopy | None:
        """Any part of an attempt: all have the state's scalars."""
        return next((held.copy() for (name, _), held in self._held.items() if name == attempt), None)

    def take(self, attempt: str, index: int) -> StateCopy | None:
        """A shard's part, whose memory is the caller's from here on."""
        received = self._held.pop((attempt, index), None)
        if received is None:
            return None
        copy = received.copy()
        received.release()
        return copy

    def drop(self, attempt: str) -> None:
        """Forgets what is held of an attempt."""
        for name, index in list(self._held):
            if name == attempt:
                self._drop(name, index)

    def _drop(self, attempt: str, index: int) -> None:
        if (received := self._held.pop((attempt, index), None)) is not None:
            received.release()

    def _expire(self, attempt: str, index: int, received: ReceivedState) -> None:
        if self._held.get((attempt, index)) is received:
            self._drop(attempt, index)
