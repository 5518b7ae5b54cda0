"""Shards whose weights tell what a writer has taken, and entries for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.state.buffers import Hold, VectorPool
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard

__all__ = ["FIRST", "SECOND", "comparing_shard", "counting_shard", "entry", "free", "held", "run", "value"]

FIRST, SECOND = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
"""Distances between two pushes."""


def counting_shard() -> Shard:
    """A shard that counts: lr 1, and each entry's gradient is minus its place in the log."""
    return _shard({"policy": "async"})


def comparing_shard() -> Shard:
    """One of a run's shards under krum; a push is minus its place in the log. Of two the first is the update."""
    return _shard({"policy": "sync", "max_batch": 5, "robust": "krum", "f": 1}, is_part=True)


def _shard(aggregation: dict[str, Any], *, is_part: bool = False) -> Shard:
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": aggregation,
            "parameters": [{"name": "w", "shape": [1]}],
        }
    )
    shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"), is_part=is_part)
    shard.initialize(torch.zeros(1), epoch=1)
    return shard


def entry(seq: int, epoch: int = 1) -> Entry:
    """A push that is an update."""
    return Entry(seq, epoch, advance=True, gradient=torch.tensor([-float(seq)]))


def value(shard: Shard) -> float:
    """The one weight of y."""
    out = torch.empty(1)
    shard.copy_point("y", out)
    return float(out)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Runs a test's work, unless that takes too long."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


class Peer:
    """A sender that is never slow."""

    speed = 0.0
    can_end = True

    def is_slow(self) -> bool:
        return False

    def end(self) -> None: ...

    def on_excused(self) -> None: ...


def held(pool: VectorPool, seq: int, epoch: int = 1) -> Entry:
    """An entry whose gradient lies in a vector of a pool."""
    vector = pool.try_acquire()
    assert vector is not None
    gradient = vector.tensor()
    gradient.fill_(-float(seq))
    return Entry(seq, epoch, advance=True, gradient=gradient, hold=Hold(pool, vector, Peer()))


def free(pool: VectorPool) -> int:
    """How many vectors of a pool are not lent."""
    taken = []
    while (vector := pool.try_acquire()) is not None:
        taken.append(vector)
    for vector in taken:
        pool.release(vector)
    return len(taken)
