"""Memory that a shard lends to who sends it: its state's own, for as long as the state stays as it is.

y as fp32 is what most pulls want, and what the state holds. Whoever reads it lays a spare vector down for it. If the
state moves on before the loan has ended, it goes on in the spare vector, and the lent one is the reader's; where a
worker has its answer before it pushes again, as a rule, nothing is ever copied.
"""

from __future__ import annotations

from freestep_service.vectors import Vector

__all__ = ["Loan"]


class Loan:
    """A point of one step of an epoch in a vector that does not change until `end`.

    spare: what was laid down for it; None where the vector is the reader's already, being a copy.
    """

    def __init__(self, epoch: int, step: int, vector: Vector, spare: Vector | None = None) -> None:
        self.epoch = epoch
        self.step = step
        self.vector = vector
        self.is_copy = spare is None
        # Popping is atomic: the writer's thread and the event loop never both get it.
        self._spare = [] if spare is None else [spare]

    @property
    def is_open(self) -> bool:
        """Whether the state's memory is lent, and has not been left to the reader."""
        return bool(self._spare)

    def claim(self) -> Vector | None:
        """The spare vector, whose place the lent one takes; None where the loan has ended, or it was claimed before."""
        try:
            return self._spare.pop()
        except IndexError:
            return None

    def end(self) -> Vector:
        """The vector that is the reader's to give back: the spare one, or what it became."""
        return self.claim() or self.vector
