"""How many bodies of one sender are on their way into memory: the others of that sender wait behind them.

Who sends many slow bodies at once holds up itself and nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from freestep.errors import Overloaded

__all__ = ["Lanes"]


@dataclass
class _Lane:
    taken: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Lanes:
    """At most `most` bodies of each sender, a lease say, at once, first come, first served, on one event loop.

    `most` may be set to another number, which holds from the next body on that comes or has come.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self._lanes: dict[str, _Lane] = {}

    async def enter(self, sender: str, timeout_s: float) -> None:
        """Returns when a body of the sender may come, which `leave` is called for. Raises Overloaded after the time."""
        lane = self._lanes.setdefault(sender, _Lane())
        if lane.taken < self.most:
            lane.taken += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # It came at the same moment.
                self.leave(sender)
            with suppress(ValueError):
                lane.waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"{self.most} bodies of this sender have been on their way for {timeout_s:.3g} s"
                ) from None
            raise

    def leave(self, sender: str) -> None:
        """A body has come, or will not."""
        lane = self._lanes[sender]
        lane.taken -= 1
        while lane.waiting and lane.taken < self.most:
            turn = lane.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                lane.taken += 1
        if not lane.taken:
            del self._lanes[sender]
