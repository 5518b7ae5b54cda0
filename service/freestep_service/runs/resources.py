"""What the runs of one process share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch

from freestep.api.models import RunSpec
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.store import Store
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import Settings
from freestep_service.state.buffers import Reserve
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.memory_budget import MemoryBudget, Vectors, run_bytes
from freestep_service.storage.media import Storage

__all__ = ["Disk", "Resources"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("freestep")

_DISK_THREADS = 16
_READERS = 2


class Disk:
    """Threads of their own for storage, so that a medium that hangs holds up nothing but what needs it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_DISK_THREADS, "freestep-disk")
        self.readers = asyncio.Semaphore(_READERS)
        """Held by who reads a checkpoint that somebody wants to see, and that no run waits for."""

    async def run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Runs a blocking function of storage in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*arguments, **options))

    def close(self) -> None:
        """Ends the threads once they are done."""
        self._threads.shutdown(wait=False)


@dataclass(frozen=True)
class Resources:
    """The process's settings, store, storage, devices and threads.

    memory: what runs may take, counted when they are created. reserve: what slow peers may hold, over all runs.
    """

    settings: Settings
    store: Store
    storage: Storage
    channels: Channels
    node: Node
    device: torch.device
    locks: DeviceLocks
    metrics: Metrics
    memory: MemoryBudget
    reserve: Reserve
    disk: Disk = field(default_factory=Disk)

    async def bytes_of(self, spec: RunSpec, here: int, shards: int, vectors: Vectors | None = None) -> int:
        """The most memory that `here` of a run's shards take. vectors: as `run_bytes` has them."""
        return await asyncio.to_thread(run_bytes, spec, here, shards, self.device, vectors)

    def count(self, name: str, size: int, before: int = 0) -> None:
        """Counts the memory of a run that is there already; where it is more than `before`, and than is free, that is
        logged."""
        beyond = self.memory.count(name, size)
        if beyond and size > before:
            logger.error(
                "run %s takes up to %d bytes of memory: with the others, %d more than memory_bytes allows",
                *(name, size, beyond),
            )
