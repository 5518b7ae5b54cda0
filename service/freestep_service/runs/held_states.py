"""Parts of states that were uploaded, held for a while by the shards' owners until the run opens with them."""

from __future__ import annotations

import asyncio

from freestep_service.state.received_state import ReceivedState
from freestep_service.state.shard import StateCopy

__all__ = ["HeldStates"]

_KEPT_S = 120.0


class HeldStates:
    """The parts of one run's uploads, by upload and shard. Their memory is counted until they are taken or dropped."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], ReceivedState] = {}

    def hold(self, upload: str, index: int, received: ReceivedState) -> None:
        """Holds a shard's part, in place of one that came before, until it is taken or nobody comes for it."""
        self._drop(upload, index)
        self._held[upload, index] = received
        asyncio.get_running_loop().call_later(_KEPT_S, self._expire, upload, index, received)

    def find(self, upload: str) -> StateCopy | None:
        """Any part of an upload: all have the state's scalars."""
        return next((held.copy() for (name, _), held in self._held.items() if name == upload), None)

    def take(self, upload: str, index: int) -> StateCopy | None:
        """A shard's part, whose memory is the caller's from here on."""
        received = self._held.pop((upload, index), None)
        if received is None:
            return None
        copy = received.copy()
        received.release()
        return copy

    def drop(self, upload: str) -> None:
        """Forgets what is held of an upload."""
        for name, index in list(self._held):
            if name == upload:
                self._drop(name, index)

    def _drop(self, upload: str, index: int) -> None:
        if (received := self._held.pop((upload, index), None)) is not None:
            received.release()

    def _expire(self, upload: str, index: int, received: ReceivedState) -> None:
        if self._held.get((upload, index)) is received:
            self._drop(upload, index)
