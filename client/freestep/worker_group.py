"""The processes that are one worker together: here, a worker of one process; `process_group` has those of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from freestep.flat import Flat

__all__ = ["SINGLE_PROCESS", "Batch", "WorkerGroup", "finite"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The samples that a gradient was computed from.

    Args:
        samples: How many there are, or None if unknown.
        loss: Their mean loss, or None if unknown.
        speed: Local steps a second, of workers that take local steps.
    """

    samples: float | None
    loss: float | None
    speed: float | None = None


def finite(loss: float | Tensor | None) -> float | None:
    """A loss as it is reported: None where it is NaN or infinite."""
    number = None if loss is None else float(loss)
    return number if number is not None and math.isfinite(number) else None


class WorkerGroup:
    """A worker of one process.

    Subclasses have several processes (ranks), all of which make the same calls in the same order. An error on one rank
    is raised on all of them, so that no rank is left waiting in a collective.
    """

    rank = 0
    size = 1

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Runs a function on rank 0; every rank gets its result, or its error."""
        return function()

    def run_on_all(self, function: Callable[[], T]) -> list[T]:
        """Runs a function on every rank; every rank gets all results, or the error of the lowest rank that failed."""
        return [function()]

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """If the block fails on one rank, it fails on all."""
        yield

    def average(self, gradient: Flat, batches: Sequence[Batch]) -> Batch:
        """Replaces every rank's gradient by the mean over ranks, weighted by samples; returns the combined batch."""
        (batch,) = batches
        return batch

    def requests_shard(self, shard: int) -> bool:
        """True if this rank sends the requests of a shard."""
        return True

    def broadcast_shards(self, into: Flat, shards: int) -> None:
        """Gives every rank the parts of a flat vector that the other ranks received."""


SINGLE_PROCESS = WorkerGroup()
