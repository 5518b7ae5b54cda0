"""Points of a shard's state in memory that stays as it is while they are sent: the state's own, lent, or a copy.

y as fp32 is what most pulls want, and what the state holds. Whoever reads it lays a spare vector down for it. If the
state moves on before the view has ended, it goes on in the spare vector, and the lent one is the reader's; where a
worker has its answer before it pushes again, as a rule, nothing is ever copied.
"""

from __future__ import annotations

import asyncio

from freestep_service.state.buffers import Vector

__all__ = ["Copying", "PointView"]


class Copying:
    """How far a copy has come, whose front is sent while another thread still makes the rest.

    done: resolved, on the event loop, when it has ended; with what made it fail, if anything did.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._reached = 0
        self._waiting: list[asyncio.Future[None]] = []

    def note(self, size: int) -> None:
        """Takes note, in the copying thread, that the first `size` bytes are there."""
        self._loop.call_soon_threadsafe(self._note, size)

    def _note(self, size: int) -> None:
        self._reached = size
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    def end(self, error: BaseException | None) -> None:
        """Takes note that all is there, or never will be."""
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
            # Nobody may be reading.
            self.done.exception()
        self._note(self._reached)

    async def reach(self, size: int) -> None:
        """Returns when the first `size` bytes are there. Raises what made the copy fail."""
        while self._reached < size and not self.done.done():
            self._waiting.append(self._loop.create_future())
            await self._waiting[-1]
        if self.done.done():
            self.done.result()


class PointView:
    """A point of one step of an epoch in a vector that does not change until `end`.

    scheduled_lr: the learning rates of that step, as a shard has them. spare: what was laid down for the vector; None
        where the vector is the reader's already, being a copy. copying: where the copy is still being made.
    """

    def __init__(
        self,
        epoch: int,
        step: int,
        scheduled_lr: tuple[float, ...] | None,
        vector: Vector,
        spare: Vector | None = None,
        copying: Copying | None = None,
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.scheduled_lr = scheduled_lr
        self.vector = vector
        self.is_copy = spare is None
        self.copying = copying
        # Popping is atomic: the writer's thread and the event loop never both get it.
        self._spare = [] if spare is None else [spare]

    @property
    def is_open(self) -> bool:
        """Whether the state's memory is lent, and has not been left to the reader."""
        return bool(self._spare)

    def take_spare(self) -> Vector | None:
        """The spare vector, whose place the lent one takes; None where the view has ended, or it was claimed before."""
        try:
            return self._spare.pop()
        except IndexError:
            return None

    def end(self) -> Vector:
        """The vector that is the reader's to give back: the spare one, or what it became."""
        return self.take_spare() or self.vector
