"""One worker of a run under measurement."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, Self

import torch

from freestep import Client, Flat, Run
from freestep.lease import HeldLease

__all__ = ["Worker", "new_run", "spec"]


def spec(parameters: int, **others: Any) -> dict[str, Any]:
    """A run of one tensor, trained by AdamW Schedule-Free, which nothing but pushes disturbs."""
    return {
        "optimizer": {"algorithm": "adamw_schedule_free"},
        "aggregation": {"policy": "async"},
        "parameters": [{"name": "w", "shape": [parameters]}],
        "durability": "none",
        **others,
    }


def new_run(client: Client, name: str, parameters: int, **others: Any) -> Run:
    """A run as `spec` has it, that starts from zeros."""
    run = client.run(name)
    run.create(spec(parameters, **others))
    run.initialize(Flat(run.manifest))
    return run


class Worker:
    """Pushes one gradient again and again, and receives fresh y; a context manager, which holds a lease."""

    lease: HeldLease

    def __init__(self, run: Run, name: str = "bench", dtype: str = "F32") -> None:
        self.gradient, self.arriving = Flat(run.manifest, dtype), Flat(run.manifest, dtype)
        self.gradient.vector.normal_(generator=torch.Generator().manual_seed(0))
        self._run = run
        self._name = name
        self._step = 0

    def push(self) -> float:
        """One push + pull; returns the seconds it took."""
        began = time.perf_counter()
        claim = self.lease.claim(self._step)
        _, pulled = self._run.exchange(self.gradient, claim, self.arriving)
        seconds = time.perf_counter() - began
        self._step = pulled.step
        return seconds

    def window(self, seconds: float) -> float:
        """Pushes for so long; returns the p50 of a push, in seconds."""
        ends, pushes = time.perf_counter() + seconds, [self.push()]
        while time.perf_counter() < ends:
            pushes.append(self.push())
        return median(pushes)

    @property
    def bytes_moved(self) -> int:
        """By one push, both ways."""
        return len(self.gradient.bytes) + len(self.arriving.bytes)

    def __enter__(self) -> Self:
        self.lease = self._run.lease(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self.lease.release()
