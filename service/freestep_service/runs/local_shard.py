"""A shard that this process owns: its state, the thread that changes it, and the ways in and out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from freestep.api.models import RunSpec
from freestep.errors import (
    AlreadyInitialized,
    CoordinatorUnavailable,
    MalformedTensors,
    Overloaded,
    ShardUnavailable,
)
from freestep.wire.manifest import Manifest
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Behind, Fenced, LogPosition, Owner, Receipts, Record
from freestep_service.domain.reports import Measured
from freestep_service.runs.consistent_reads import ConsistentReads
from freestep_service.runs.pushes import Host, Pushes
from freestep_service.settings import Settings
from freestep_service.state.bodies import room
from freestep_service.state.buffers import Vector, VectorPool
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.shard import Entry, Shard
from freestep_service.state.snapshots import Reading, Snapshot, Snapshots
from freestep_service.state.staging import Body, stage, staging_vectors
from freestep_service.state.writer import Writer

__all__ = ["LocalShard"]

_POLL_S = 1.0
"""How long the outcome of an upload is listened for before Redis is asked for it."""


class LocalShard:
    """Shard `index` of `count`, owned under a token."""

    def __init__(
        self,
        run: str,
        spec: RunSpec,
        whole: Manifest,
        index: int,
        count: int,
        token: str,
        device: torch.device,
        coordinator: Coordinator,
        receipts: Receipts,
        settings: Settings,
        locks: DeviceLocks,
        host: Host,
        keep: Callable[[LocalShard, Entry], None],
    ) -> None:
        self.index = index
        self.token = token
        self.manifest = whole.part(index, count)
        self.shard = Shard(spec, self.manifest, device, room(self.manifest))
        self.writer = Writer(self.shard, f"{run}-{index}", self._taken, locks)
        self.initialized = False
        self.loaded: int | None = None
        """The generation of the run's opening whose state it has loaded."""
        self._settings = settings
        self._locks = locks
        self._keep = keep
        self._coordinator = coordinator
        self._host = host
        staging = staging_vectors(Policy.of(spec.aggregation), count)
        self._staging = VectorPool(self.manifest.numel, staging, device=device)
        self.snapshots = Snapshots(run, self.writer) if count == 1 else None
        self.cuts = (
            None if count == 1 else ConsistentReads(run, coordinator, self.writer, self.owner, settings.queue_seconds)
        )
        self.pushes = Pushes(
            spec,
            self.manifest,
            coordinator,
            self.writer,
            self.owner,
            receipts,
            settings,
            self._staging,
            locks,
            host,
            list if self.cuts is None else self.cuts.take_sent,
        )
        self._uploads: dict[str, asyncio.Future[bool]] = {}
        self._initializing = asyncio.Lock()

    def owner(self) -> Owner:
        """What this process calls Redis with, on the shard's behalf."""
        return Owner(self.index, self.token, self.writer.known)

    async def prepare(self) -> None:
        """Has ready what updates take. Until then the shard is given no state, and the run is not open for uploads."""
        await asyncio.get_running_loop().run_in_executor(self._locks.compiler, self.shard.prepare)

    # Initial weights

    async def initialize(self, body: Body, upload: str) -> None:
        """Takes this shard's part of the initial weights.

        Raises AlreadyInitialized where another upload was first, Overloaded where others had their locks for too long,
        and ShardUnavailable when the upload does not reach all shards.
        """
        # One at a time, as a run of one shard has few vectors; Redis gives the uploads to several shards their locks.
        lock = asyncio.Lock() if self._host.many else self._initializing
        async with lock:
            if self.initialized:
                raise AlreadyInitialized
            heard = self._uploads.setdefault(upload, asyncio.get_running_loop().create_future())
            vector = None
            try:
                if self._host.many:
                    await self._turn(upload, heard)
                vector = await self._staging.acquire()
                try:
                    parameters, norm = await self._receive(body, vector, upload)
                    if norm is None:
                        raise MalformedTensors("the parameters hold NaN or infinity")
                except BaseException:
                    if self._host.many:
                        with suppress(CoordinatorUnavailable, ShardUnavailable, AlreadyInitialized):
                            await self._say(upload, "withdrawn")
                    raise
                await self._agree(upload, heard)
                if not self.initialized:
                    await self.writer.run(self.shard.initialize, parameters, self.writer.epoch)
                    self.initialized = True
                    self.writer.resume(self.writer.epoch, 0, 0)
            finally:
                self._uploads.pop(upload, None)
                if vector is not None:
                    self._staging.release(vector)

    async def _turn(self, upload: str, heard: asyncio.Future[bool]) -> None:
        """Returns when it is an upload's turn."""
        deadline = asyncio.get_running_loop().time() + self._settings.queue_seconds
        while await self._say(upload, "coming") == "waiting":
            if asyncio.get_running_loop().time() >= deadline:
                raise Overloaded
            await asyncio.wait([heard], timeout=_POLL_S)
            if heard.done() and not heard.result():
                raise AlreadyInitialized

    async def _receive(self, body: Body, vector: Vector, upload: str) -> tuple[Tensor, float | None]:
        """As `stage`, and keeps the upload's turn meanwhile."""
        staging = asyncio.ensure_future(stage(body, self.manifest, vector, self._locks))
        try:
            while not (await asyncio.wait([staging], timeout=_POLL_S))[0]:
                with suppress(CoordinatorUnavailable, ShardUnavailable):
                    if self._host.many:
                        await self._say(upload, "coming")
        finally:
            if not staging.done():
                staging.cancel()
                await asyncio.wait([staging])
        parameters, norm, _ = staging.result()
        # Only gradients are encoded.
        assert isinstance(parameters, Tensor)
        return parameters, norm

    async def _agree(self, upload: str, heard: asyncio.Future[bool]) -> None:
        """Returns once all shards have their parts of the upload. Raises AlreadyInitialized when it has lost."""
        deadline = asyncio.get_running_loop().time() + self._settings.commit_seconds
        progress = "staged"
        while True:
            try:
                status = await self._say(upload, progress)
            except CoordinatorUnavailable:
                # Whether this part counts must not stay unknown, unless it is the only one.
                if not self._host.many:
                    raise
                await asyncio.sleep(_POLL_S)
                continue
            if status == "initialized":
                return
            if status != "staged":
                raise ShardUnavailable("the upload has not reached all shards")
            await asyncio.wait([heard], timeout=_POLL_S)
            if heard.done() and not heard.result():
                raise AlreadyInitialized
            if asyncio.get_running_loop().time() >= deadline:
                progress = "withdrawn"

    async def _say(self, upload: str, progress: str) -> str:
        """Tells Redis how far this shard's part of an upload is; what comes of that, see lua/initial_weights.lua."""
        patience_ms = int(1000 * self._settings.stall_seconds)
        while True:
            try:
                status = await self._coordinator.opening.initial_weights(self.owner(), upload, progress, patience_ms)
            except Behind:
                await self._host.reopen()
                continue
            except Fenced:
                self._host.fenced()
                raise ShardUnavailable from None
            if status == "already-initialized":
                raise AlreadyInitialized
            return status

    def uploaded(self, upload: str) -> None:
        """An upload has won."""
        for name, heard in self._uploads.items():
            if not heard.done():
                heard.set_result(name == upload)

    # The log

    def hear(self, entry: dict[str, Any]) -> bool:
        """Takes an entry of the log, as Redis tells it; False where it is a push whose gradient is not here."""
        epoch, seq, cuts = entry["epoch"], entry["seq"], entry.get("cuts") or {}
        if epoch != self.writer.epoch or self.writer.has(epoch, seq):
            return True
        self.writer.heard_of(epoch, seq)
        if "key" in entry:
            return self.pushes.decided(entry["key"], Record.from_json(entry["record"]), cuts)
        measured = entry.get("measured")
        made = Entry(
            seq,
            epoch,
            advance=entry["advance"],
            cuts=cuts,
            checkpoint=bool(entry.get("checkpoint")),
            measured=measured and Measured(measured["name"], measured["step"], float(measured["value"])),
        )
        self.writer.submit(made)
        return True

    def _taken(self, entry: Entry) -> None:
        if self.cuts is not None:
            self.cuts.take(entry)
        if entry.checkpoint:
            self._keep(self, entry)

    # Points

    def read(self, reading: Reading) -> AbstractAsyncContextManager[Snapshot]:
        """This shard's part of a point as a body: of the newest step, or of a ticket's cut."""
        if self.cuts is not None:
            return self.cuts.read(reading)
        assert self.snapshots is not None
        return self.snapshots.read(reading.point, reading.dtype)

    @property
    def known(self) -> LogPosition:
        return self.writer.known

    async def close(self) -> bool:
        """Stops; whether no push was on its way."""
        settled = await self.pushes.close()
        if self.cuts is not None:
            await self.cuts.close()
        for heard in self._uploads.values():
            if not heard.done():
                heard.set_exception(ShardUnavailable())
                # Its waiter may have left.
                heard.exception()
        self.writer.close()
        return settled
