"""Transfers: how fast the peers that hold a shard's memory send or receive.

The law of this file: no IO. A peer behind a slow line may hold memory, but what it holds is counted apart, so that it
costs the fast ones nothing.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["GRACE_S", "Transfer"]

GRACE_S = 0.05
"""Seconds in which no peer is slow: a transfer begins with the system's buffers and the scheduling of the loop."""


class Transfer:
    """One body on its way, in or out, and the memory it holds meanwhile.

    moved: how many bytes have passed so far. clock: seconds, monotonic. floor: bytes a second below which the peer is
    slow. end: ends the transfer, where its memory is needed and none is left for slow peers.
    """

    def __init__(
        self,
        moved: Callable[[], int],
        clock: Callable[[], float],
        floor: float,
        end: Callable[[], None] = lambda: None,
        on_excused: Callable[[], None] = lambda: None,
    ) -> None:
        self._moved = moved
        self._clock = clock
        self._floor = floor
        self._began = clock()
        self.end = end
        self.can_end = True
        """Whether the memory is free soon after `end`; not any more where a body has come, whatever it waits for."""
        self.on_excused = on_excused
        """Called once, when the memory is counted apart."""

    @property
    def speed(self) -> float:
        """Bytes a second since the transfer began."""
        return self._moved() / max(self._clock() - self._began, 1e-9)

    def is_slow(self) -> bool:
        """Whether the peer has moved less than `floor` bytes a second, beyond the grace at the beginning."""
        elapsed = self._clock() - self._began - GRACE_S
        return elapsed > 0 and self._moved() < self._floor * elapsed
