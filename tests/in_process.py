"""The runs of a service without its web: a registry over a real store, and bodies that are handed to it."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from freestep.api.models import Lease, RunSpec
from freestep.errors import ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.store import Store
from freestep_service.domain.records import Claim
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.consistent_reads import Reading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.registry import Registry
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import Settings
from freestep_service.state.compute import HOST, DeviceLocks
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.media import open_storage

__all__ = [
    "NUMEL",
    "Bytes",
    "Medium",
    "claim_of",
    "in_order",
    "initialize",
    "lease_of",
    "new_run",
    "part_of",
    "process",
    "pull",
    "push",
    "resources_of",
    "run_async",
    "spec_of",
    "until",
    "until_shared",
]

NUMEL = 8


def run_async(work: Callable[[], Awaitable[None]], bound_s: float = 60.0) -> None:
    """Runs a test's coroutine, for at most `bound_s` seconds."""

    async def bounded() -> None:
        async with asyncio.timeout(bound_s):
            await work()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool], what: str, bound_s: float = 30.0) -> None:
    """Returns when a condition holds. what: for the failure."""
    try:
        async with asyncio.timeout(bound_s):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} has not come within {bound_s:g} s") from None


class Bytes:
    """A body that has been received already; `gate`: it is handed over once that is set."""

    def __init__(self, content: bytes, gate: asyncio.Event | None = None) -> None:
        self.length = len(content)
        self._content = content
        self._gate = gate

    async def receive_into(self, receiver: Receiver) -> str:
        half = self.length // 2
        lay(receiver, self._content[:half])
        if self._gate is not None:
            await self._gate.wait()
        lay(receiver, self._content[half:])
        return await self.receive_digest()

    async def receive_digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._content)


@asynccontextmanager
async def resources_of(
    url: str, data_dir: Path, clock: Callable[[], float] = time.monotonic, **settings: Any
) -> AsyncIterator[Resources]:
    """What a process has; `url`: of its store. `node_url` and `storage` may be given too."""
    node_url = settings.pop("node_url", "http://127.0.0.1:1")
    storage = settings.pop("storage", None) or open_storage(data_dir)
    ordinary = {"data_dir": data_dir, "redis_url": url, "checkpoint_seconds": 3600.0, "inline_elements": 0}
    made = Settings(**ordinary | settings)
    store = await Store.connect(url)
    node = Node(node_url, int(1000 * made.owner_ttl_seconds), clock=clock)
    memory = MemoryBudget(made.memory_bytes or 2**30)
    reserve = MemoryBudget(2**24 if made.slow_peer_bytes is None else made.slow_peer_bytes)
    locks = DeviceLocks(made.inline_elements)
    try:
        yield Resources(made, store, storage, Channels(store), node, HOST, locks, Metrics(), memory, reserve)
    finally:
        await store.close()


@asynccontextmanager
async def process(url: str, data_dir: Path, **settings: Any) -> AsyncIterator[Registry]:
    """A process's registry, which looks after its runs; arguments as of `resources_of`."""
    async with resources_of(url, data_dir, **settings) as resources:
        registry = Registry(resources)
        try:
            await registry.start()
            yield registry
        finally:
            await registry.close()


def spec_of(shards: int = 1, **members: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [NUMEL]}],
            "shards": shards,
            **members,
        }
    )


async def new_run(registry: Registry, name: str = "run", shards: int = 1, **members: Any) -> Run:
    """A run whose weights are zeros, and which takes gradients off them as they are."""
    run, _ = await registry.create(name, spec_of(shards, **members), ANYBODY)
    await initialize(run)
    return run


async def initialize(run: Run) -> None:
    """Uploads zeros to all shards."""
    zeros = torch.zeros(NUMEL)
    await asyncio.gather(
        *(run.initialize(run.shard(index), part_of(run, index, zeros), "upload") for index in range(run.count))
    )


async def until_shared(*runs: Run) -> None:
    """Returns when each of a run's processes has the same number of its shards, and all shards have their state."""

    def is_shared() -> bool:
        ready = [{shard.index for shard in run._shards if shard.core.loaded is not None} for run in runs]
        share = runs[0].count // len(runs)
        return all(len(indices) == share for indices in ready) and len(set().union(*ready)) == runs[0].count

    await until(is_shared, "a share for each process")


def part_of(run: Run, index: int, whole: Tensor, gate: asyncio.Event | None = None) -> Bytes:
    """A shard's part of a flat vector of the run, as a body."""
    part: Manifest = run.manifest.part(index, run.count)
    return Bytes(safetensors.torch.save({"w": whole[part.begin : part.end].clone()}), gate)


def claim_of(lease: Lease, key: str, step: int = 0) -> Claim:
    return Claim(lease.lease, lease.token, step, key)


async def push(
    run: Run, claim: Claim, value: float = -1.0, gate: asyncio.Event | None = None, **options: Any
) -> list[Any]:
    """Pushes a gradient of equal elements to all shards; their outcomes."""
    whole, shards = torch.full((NUMEL,), value), [run.shard(index) for index in range(run.count)]
    return list(
        await asyncio.gather(
            *(shard.push(claim, part_of(run, shard.index, whole, gate), **options) for shard in shards)
        )
    )


def in_order(run: Run) -> list[str]:
    """The calls of pushes to Redis, as they come."""
    coordinator, seen = run.coordinator.pushes, []
    for name in ("admit", "commit", "push", "discard"):
        call = getattr(coordinator, name)

        async def noting(*args: Any, name: str = name, call: Any = call, **options: Any) -> Any:
            seen.append(name)
            return await call(*args, **options)

        setattr(coordinator, name, noting)
    return seen


async def lease_of(run: Run, worker: str = "worker") -> Lease:
    """A lease, once the run is open."""
    while True:
        try:
            return await run.leases.grant(worker, None)
        except ShardUnavailable:
            await asyncio.sleep(0.01)


async def pull(shard: LocalShard, point: Any = "y") -> tuple[int, float]:
    """A shard's step and the first element of its point."""
    async with shard.read(Reading(point, "F32")) as body:
        await body.reach(len(body.data))
        return body.step, float(torch.frombuffer(bytearray(body.data), dtype=torch.float32)[0])


class Medium(LocalStorage):
    """A directory that is full, keeps its files, fails to read, or hangs, when the test says so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_full = False
        self.keeps: str | None = None
        """What may not be written or removed: paths with this in them."""
        self.fails: str | None = None
        """What cannot be listed or read: paths with this in them."""
        self.reads: list[str] = []
        """The files that were read, or were to be."""
        self.hangs: str | None = None
        self.may_go_on = threading.Event()

    def _write(self, path: str, pieces: Any) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        if self.keeps is not None and self.keeps in path:
            raise OSError(30, "Read-only file system")
        super()._write(path, pieces)

    def _remove(self, path: str) -> None:
        if self.keeps is not None and self.keeps in path:
            raise OSError(30, "Read-only file system")
        super()._remove(path)

    def _names(self, directory: str) -> list[str]:
        if self.fails is not None and self.fails in directory:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._names(directory)

    def _read(self, path: str) -> bytes:
        self._begin_to_read(path)
        return super()._read(path)

    def _open(self, path: str) -> io.BufferedReader:
        self._begin_to_read(path)
        return super()._open(path)

    def _begin_to_read(self, path: str) -> None:
        self.reads.append(path)
        if self.hangs is not None and self.hangs in path:
            assert self.may_go_on.wait(60)
        if self.fails is not None and self.fails in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
