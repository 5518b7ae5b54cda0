"""The processes that are one worker together: one alone, or the ranks of a torch.distributed group.

Rank 0 speaks for the worker. Whatever fails on one rank is raised on all of them, the same error everywhere, so that
no rank is left waiting in a collective and all take the same way on from there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from freestep.errors import FreestepError
from freestep.flat import Flat

__all__ = ["ALONE", "Batch", "Group", "Ranks", "ranks_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What a gradient is of: how many samples, and their loss, where that is known.

    speed: the steps that its worker takes by itself in a second, where it does so.
    """

    samples: float | None
    loss: float | None
    speed: float | None = None


class Ranks:
    """A worker of one process."""

    rank = 0
    size = 1

    def first(self, work: Callable[[], T]) -> T:
        """Does a work on rank 0. Every rank gets its result, or its error."""
        return work()

    def every(self, work: Callable[[], T]) -> list[T]:
        """Does a work on every rank. Every rank gets all results, or the error of the lowest rank that has one."""
        return [work()]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done in it may fail on any rank, and then fails on all."""
        yield

    def mean(self, gradient: Flat, batches: Sequence[Batch]) -> Batch:
        """Makes every rank's gradient the mean over ranks, weighted by samples; returns the batch that it is of."""
        (batch,) = batches
        return batch

    def owns(self, shard: int) -> bool:
        """Whether this rank asks for a shard."""
        return True

    def spread(self, into: Flat, shards: int) -> None:
        """Gives every rank what the others received of a flat vector."""


ALONE = Ranks()


class Group(Ranks):
    """A worker of several processes: the ranks of a group that can communicate tensors of the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def first(self, work: Callable[[], T]) -> T:
        result, error = _outcome(work) if self.rank == 0 else (None, None)
        told: list[Any] = [(result, _portable(error, 0))]
        dist.broadcast_object_list(told, self._global(0), self._group)
        if error is None:
            result, error = told[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def every(self, work: Callable[[], T]) -> list[T]:
        result, error = _outcome(work)
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (result, _portable(error, self.rank)), self._group)
        for rank, (_, theirs) in enumerate(told):
            if theirs is not None:
                raise theirs if error is None or rank != self.rank else error
        return [result for result, _ in told]

    @contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught

        def outcome() -> None:
            if error is not None:
                raise error

        self.every(outcome)

    def mean(self, gradient: Flat, batches: Sequence[Batch]) -> Batch:
        counts = [batch.samples for batch in batches if batch.samples is not None]
        total = sum(counts) if len(counts) == self.size else None
        weights = [batch.samples / total if total and batch.samples is not None else 1 / self.size for batch in batches]
        # In fp32, and in place where the vector is fp32.
        exact = gradient.vector.float()
        exact.mul_(weights[self.rank])
        dist.all_reduce(exact, group=self._group)
        if exact is not gradient.vector:
            gradient.vector.copy_(exact)
        losses = [
            (weight, batch.loss) for weight, batch in zip(weights, batches, strict=True) if batch.loss is not None
        ]
        share = sum(weight for weight, _ in losses)
        return Batch(total, sum(weight * loss for weight, loss in losses) / share if share else None)

    def owns(self, shard: int) -> bool:
        return shard % self.size == self.rank

    def spread(self, into: Flat, shards: int) -> None:
        works = [
            # As bytes, since not every backend knows every dtype.
            dist.broadcast(
                torch.frombuffer(part.bytes, dtype=torch.uint8), self._global(shard % self.size), self._group, True
            )
            for shard, part in enumerate(into.parts(shards))
            if part.bytes
        ]
        for work in works:
            work.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)


def ranks_of(group: dist.ProcessGroup | Literal[True] | None) -> Ranks:
    """None: this process alone. True: all processes of torch.distributed, which is initialized already.

    Every rank must make this call: where the default group's backend has no tensors of the host, a group is made.
    """
    if group is None:
        return ALONE
    if group is True:
        if not (dist.is_available() and dist.is_initialized()):
            raise FreestepError("process_group=True needs torch.distributed.init_process_group() first")
        on_the_host = "gloo" in str(dist.get_backend_config())
        group = dist.group.WORLD if on_the_host else dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return Group(group)


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None, rank: int) -> Exception | None:
    """An error as the other ranks get it: freestep's own as they are, others by what they say."""
    if error is None:
        return None
    if isinstance(error, FreestepError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            return FreestepError(f"rank {rank}: {error}")
    return FreestepError(f"rank {rank}: {type(error).__name__}: {error}")
