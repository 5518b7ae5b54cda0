"""The runs that this service knows, and what is done for all of them in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import torch
from pydantic import ValidationError

from freestep.api.models import RunSpec
from freestep.errors import CoordinatorUnavailable, FreestepError, InvalidSpec, RunExists, RunNotFound
from freestep.wire.header import body_limit
from freestep.wire.manifest import Manifest
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.opening import read_run
from freestep_service.coordination.run_scripts import RUNS_KEY
from freestep_service.coordination.store import Store, reachable
from freestep_service.runs.run import Run
from freestep_service.runs.telemetry import Metrics, RunMetrics
from freestep_service.settings import Settings
from freestep_service.state.compute import DeviceLocks
from freestep_service.storage.media import Storage
from freestep_service.storage.run_files import RunFile

__all__ = ["Registry"]

logger = logging.getLogger("freestep")

_HOUSEKEEPING_S = 0.1
_SLOWEST_BEAT_S = 1.0


class Registry:
    """Every run by its name."""

    def __init__(
        self, settings: Settings, store: Store, storage: Storage, device: torch.device, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._store = store
        self._storage = storage
        self._device = device
        self._locks = DeviceLocks(settings.inline_elements)
        self._metrics = metrics
        self.node = Node(settings.own_url(), int(1000 * settings.owner_ttl_seconds))
        self._messages = Channels(store)
        self._runs: dict[str, Run] = {}
        self._creating = asyncio.Lock()
        self._closing = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Run:
        """A run that is known here already. Raises RunNotFound."""
        try:
            return self._runs[name]
        except KeyError:
            raise RunNotFound(f"there is no run {name!r}", run=name) from None

    async def find(self, name: str) -> Run:
        """A run, which another process may have created. Raises RunNotFound and CoordinatorUnavailable."""
        if name not in self._runs:
            async with self._creating:
                if name not in self._runs:
                    await self._open(name, is_from_elsewhere=True)
        return self.get(name)

    def all(self) -> list[Run]:
        return [self._runs[name] for name in sorted(self._runs)]

    async def create(self, name: str, spec: RunSpec) -> tuple[Run, bool]:
        """The run, and whether it is new. Raises RunExists when it is there with another spec."""
        limit = body_limit(Manifest.of(spec))
        if limit > self._settings.max_body_bytes:
            raise InvalidSpec(
                f"a body of these parameters may have {limit} bytes, more than the service accepts",
                field="parameters",
            )
        with suppress(RunNotFound):
            return self._same(await self.find(name), spec), False
        async with self._creating:
            if name in self._runs:
                return self._same(self._runs[name], spec), False
            await self.node.heartbeat(self._store)
            run = self._make(name, spec, spec.shards)
            await run.create()
            self._runs[name] = run
            await run.keep()
            if self.node.live_peers:
                await self._messages.publish({"kind": "created", "run": name})
            return run, True

    def _same(self, run: Run, spec: RunSpec) -> Run:
        if run.spec != spec:
            raise RunExists(f"the run {run.name!r} exists with another spec", run=run.name)
        return run

    async def delete(self, name: str) -> None:
        """Raises RunNotFound."""
        await self.find(name)
        async with self._creating:
            await self.get(name).delete()
            del self._runs[name]

    async def start(self) -> None:
        """Opens every run that storage or Redis knows, as far as it is for this process to, and begins housekeeping."""
        await self.node.heartbeat(self._store)
        await self._messages.start(self._hear)
        for name in sorted(await self._names()):
            await self._open(name)
        self._spawn(self._keep_house())
        self._spawn(self._beat())

    async def _names(self) -> set[str]:
        with reachable():
            known = set(await self._store.client.smembers(RUNS_KEY))
        return known | set(await asyncio.to_thread(self._storage.names, "runs"))

    async def close(self) -> None:
        """Writes the last checkpoints."""
        self._closing.set()
        for run in self._runs.values():
            run.checkpointing.give_up()
        # Not cancelled: a command cut short leaves its connection, and a checkpoint its thread, behind.
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        for run in self._runs.values():
            try:
                await run.close()
            except Exception:
                logger.exception("run %s could not be closed in order", run.name)
        await self._messages.close()
        with suppress(CoordinatorUnavailable):
            await self.node.leave(self._store)

    def _make(self, name: str, spec: RunSpec, shards: int) -> Run:
        metrics = RunMetrics(self._metrics, name)
        return Run(
            name, spec, shards, self.node, self._settings, self._store, self._storage, self._messages, self._device,
            self._locks, metrics,
        )  # fmt: skip

    async def _open(self, name: str, *, is_from_elsewhere: bool = False) -> None:
        standing = await read_run(self._store, name)
        if standing is None and is_from_elsewhere:
            return
        try:
            file = await asyncio.to_thread(RunFile.read, self._storage, name)
        except (OSError, ValueError, TypeError) as error:
            if standing is None:
                if not isinstance(error, FileNotFoundError):
                    logger.error("run %s cannot be opened: %s", name, error)
                return
            file = None
        try:
            spec = RunSpec.model_validate_json(file.spec if file else standing.run["spec"] if standing else "")
        except ValidationError as error:
            logger.error("run %s cannot be opened, its spec is not valid: %s", name, error)
            return
        run = self._make(name, spec, standing.count if standing else file.shards if file else spec.shards)
        self._runs[name] = run
        await run.keep()

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is not None and message["kind"] == "created":
            self._spawn(self._look_at(message["run"]))

    async def _look_at(self, name: str) -> None:
        with suppress(RunNotFound, CoordinatorUnavailable):
            await self.find(name)

    async def _beat(self) -> None:
        """Keeps what this process owns, and notices what others have created or lost."""
        pause = min(_SLOWEST_BEAT_S, self._settings.owner_ttl_seconds / 4)
        while not await self._is_closing(pause):
            try:
                await self.node.heartbeat(self._store)
                if self.node.live_peers:
                    for name in await self._names() - self._runs.keys():
                        await self._look_at(name)
            except (CoordinatorUnavailable, OSError):
                continue
            for run in self.all():
                self._spawn(self._prolong(run))

    async def _prolong(self, run: Run) -> None:
        try:
            await run.prolong()
        except Exception:
            logger.exception("run %s could not be looked after", run.name)
        if run.is_gone and self._runs.get(run.name) is run:
            del self._runs[run.name]
            await run.forget()

    async def _keep_house(self) -> None:
        while not await self._is_closing(_HOUSEKEEPING_S):
            for run in self.all():
                if not run.leads:
                    continue
                try:
                    await run.leases.expire()
                except Exception:
                    logger.exception("the leases of run %s could not be looked after", run.name)
                if run.is_checkpoint_due():
                    self._spawn(self._checkpoint(run))

    async def _is_closing(self, pause: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), pause)
        return self._closing.is_set()

    async def _checkpoint(self, run: Run) -> None:
        try:
            await run.checkpoint()
        except FreestepError as error:
            logger.warning("a checkpoint of run %s was not written: %s", run.name, error)
        except OSError:
            logger.exception("a checkpoint of run %s could not be written", run.name)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
