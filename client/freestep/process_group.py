"""Workers of several processes: the ranks of a torch.distributed group."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from freestep.errors import FreestepError
from freestep.flat import Flat
from freestep.worker_group import SINGLE_PROCESS, Batch, WorkerGroup

__all__ = ["ProcessGroup", "warn_of_ranks", "worker_group"]

logger = logging.getLogger("freestep")

T = TypeVar("T")


def worker_group(group: dist.ProcessGroup | bool | Literal["auto"] | None) -> WorkerGroup:
    """The worker that a process group makes: None and False are this process alone, True is the default group.

    "auto" is the default group if there is one of several ranks, else this process alone.

    Collective: every rank must call it, since a gloo group is created if the default group's backend has no CPU
        tensors.
    """
    if group is None or group is False or (group == "auto" and _ranks() == 1):
        return SINGLE_PROCESS
    if isinstance(group, str) and group != "auto":
        raise FreestepError(f"process_group must be a group, True, False or 'auto', not {group!r}")
    if group is True or group == "auto":
        if not (dist.is_available() and dist.is_initialized()):
            raise FreestepError("process_group=True needs torch.distributed.init_process_group() first")
        has_gloo = "gloo" in str(dist.get_backend_config())
        group = dist.group.WORLD if has_gloo else dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return ProcessGroup(group)


def warn_of_ranks() -> None:
    """Warns where this process is a rank of several, and a worker of its own."""
    if (ranks := _ranks()) > 1:
        logger.warning(
            "torch.distributed has %d ranks, and each of them is a worker of its own here. If gradients are averaged "
            "over ranks, as DistributedDataParallel does, every batch counts %d times: pass process_group=True, which "
            "makes the ranks one worker. process_group=False says that they are meant to be several",
            ranks,
            ranks,
        )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ProcessGroup(WorkerGroup):
    """A worker of several processes, over a group whose backend has collectives for CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def run_on_first(self, function: Callable[[], T]) -> T:
        result, error = _outcome(function) if self.rank == 0 else (None, None)
        shared: list[Any] = [(result, _portable(error, 0))]
        dist.broadcast_object_list(shared, self._global(0), self._group)
        if error is None:
            result, error = shared[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def run_on_all(self, function: Callable[[], T]) -> list[T]:
        result, error = _outcome(function)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (result, _portable(error, self.rank)), self._group)
        if error is not None and not isinstance(error, Exception):
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise failure if error is None or rank != self.rank else error
        return [result for result, _ in gathered]

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught

        def raise_own() -> None:
            if error is not None:
                raise error

        self.run_on_all(raise_own)

    def average(self, gradient: Flat, batches: Sequence[Batch]) -> Batch:
        counts = [batch.samples for batch in batches if batch.samples is not None]
        total = sum(counts) if len(counts) == self.size else None
        weights = [batch.samples / total if total and batch.samples is not None else 1 / self.size for batch in batches]
        # In fp32, and in place if the vector is fp32.
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

    def requests_shard(self, shard: int) -> bool:
        return shard % self.size == self.rank

    def broadcast_shards(self, into: Flat, shards: int) -> None:
        pending = [
            # As bytes, since not every backend supports every dtype.
            dist.broadcast(
                torch.frombuffer(part.bytes, dtype=torch.uint8), self._global(shard % self.size), self._group, True
            )
            for shard, part in enumerate(into.parts(shards))
            if part.bytes
        ]
        for each in pending:
            each.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """A function's result or error; an interrupt is one too, since the other ranks wait for this one's outcome."""
    try:
        return function(), None
    except BaseException as error:
        return None, error


def _portable(error: BaseException | None, rank: int) -> BaseException | None:
    """The error that the other ranks raise: freestep's own, an interrupt, or a FreestepError of another's text."""
    if error is None:
        return None
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"on rank {rank}")
    if isinstance(error, FreestepError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            return FreestepError(f"rank {rank}: {error}")
    return FreestepError(f"rank {rank}: {type(error).__name__}: {error}")
