"""A shard's state, its writer and its memory, as the parts that work on it share them."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import torch

from freestep.api.models import RunSpec
from freestep.errors import RunNotInitialized
from freestep.wire.manifest import Manifest
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import LogPosition, Owner
from freestep_service.runs.context import RunContext
from freestep_service.runs.shard_journal import ShardJournal
from freestep_service.state.bodies import room
from freestep_service.state.buffers import VectorPool
from freestep_service.state.memory_budget import Vectors, snapshot_vectors
from freestep_service.state.shard import Shard, StateCopy
from freestep_service.state.snapshots import Snapshots
from freestep_service.state.staging import Staging, staging_vectors
from freestep_service.state.writer import Writer
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.part_manifest import part_name

__all__ = ["Refusal", "ShardCore"]


class Refusal(NamedTuple):
    """Why a journal was refused, and by what: while that is as it was, it is not read again."""

    evidence: object
    error: Damaged


class ShardCore:
    """Shard `index` of `count`, owned under a fencing token."""

    def __init__(self, context: RunContext, index: int, count: int, token: str) -> None:
        resources, settings = context.resources, context.settings
        self.index = index
        self.count = count
        self.token = token
        self.manifest: Manifest = context.manifest.part(index, count)
        self.initialized = False
        self.writing = asyncio.Lock()
        """Held while a part of a checkpoint is being written."""
        self.loaded: int | None = None
        """The generation of the run's opening whose state it has loaded."""
        self.is_repaired = False
        """Whether its state lacks entries that were acknowledged, which a repair of its journal has given up."""
        self.refusal: Refusal | None = None
        """Why it has no state of its journal, if that was refused."""
        self.closed: LogPosition | None = None
        """Where an orderly shutdown left it, until it has loaded a state."""
        device = _device(resources.device, index)
        bytes_ = room(self.manifest)
        self.shard = Shard(context.spec, self.manifest, device, bytes_, is_part=self.is_sharded)
        self.journal: ShardJournal | None = None
        """Where its pushes are kept from before they are acknowledged until a checkpoint is written."""
        if context.keeps_journal:
            part = part_name(self.manifest.begin, self.manifest.end)
            directory = settings.journals() / context.name / part
            self.journal = ShardJournal(directory, context.name, context.origin.id, resources.disk)
        record = self.journal.record if self.journal is not None else None
        self.writer = Writer(self.shard, f"run {context.name}, shard {index}", resources.locks, record)
        self._gathered_vectors = self.shard.gathered_vectors
        vectors = staging_vectors(self.shard.policy, count)
        bodies = VectorPool(self.manifest.numel, vectors, device=device, reserve=resources.reserve)
        self.staging = Staging(self.manifest, bodies, resources.locks, settings.slow_bytes_per_second)
        answers = VectorPool(self.manifest.numel, snapshot_vectors(count), bytes_, device, resources.reserve)
        self.snapshots = Snapshots(context.name, self.writer, answers)
        self._compiler = resources.locks.compiler

    @property
    def is_sharded(self) -> bool:
        """Whether the run has other shards."""
        return self.count > 1

    def owner(self) -> Owner:
        """How this process calls Redis on the shard's behalf."""
        return Owner(self.index, self.token, self.writer.position)

    def require_initialized(self) -> None:
        """Raises RunNotInitialized."""
        if not self.initialized:
            raise RunNotInitialized

    @property
    def vectors(self) -> Vectors:
        """Those that the shard has, or may have as of the entries that it was given."""
        gathered = max(self._gathered_vectors, self.shard.gathered_vectors)
        return Vectors(self.staging.pool.most, gathered)

    def follow(self, policy: Policy) -> None:
        """Has as many vectors as a policy takes, which is in force from here on."""
        self._gathered_vectors = policy.gathered_vectors
        self.staging.pool.resize(staging_vectors(policy, self.count))

    async def load(self, state: StateCopy | None, epoch: int = 0) -> None:
        """Has the shard take a state as its own, in an epoch; None: it forgets the one that it has."""
        if state is None:
            await self.writer.load(self.shard.clear)
        else:
            await self.writer.load(self.shard.load, state, epoch)
        self.follow(self.shard.policy)

    async def prepare(self, spec: RunSpec | None = None) -> None:
        """Compiles what updates need. Until then the shard is given no state, and the run takes no uploads.

        spec: the one that will be in force; None for the one that is.
        """
        await asyncio.get_running_loop().run_in_executor(self._compiler, self.shard.prepare, spec)


def _device(device: torch.device, index: int) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", index % torch.cuda.device_count())
    return device
