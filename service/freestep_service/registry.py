"""The runs of this service, and what is done for all of them in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress

import torch
from pydantic import ValidationError

from freestep.errors import FreestepError, InvalidSpec, RunExists, RunNotFound
from freestep.models import RunSpec
from freestep.wire import Manifest
from freestep_service.checkpoints import RunFile
from freestep_service.coordinator import RUNS_KEY, Coordinator
from freestep_service.metrics import Metrics, RunMetrics
from freestep_service.run import Run
from freestep_service.settings import Settings
from freestep_service.store import Store, reachable

__all__ = ["Registry"]

logger = logging.getLogger("freestep")

_HOUSEKEEPING_S = 0.1


class Registry:
    """Every run by its name."""

    def __init__(self, settings: Settings, store: Store, device: torch.device, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._device = device
        self._metrics = metrics
        self._runs: dict[str, Run] = {}
        self._creating = asyncio.Lock()
        self._closing = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Run:
        """Raises RunNotFound."""
        try:
            return self._runs[name]
        except KeyError:
            raise RunNotFound(f"there is no run {name!r}", run=name) from None

    def all(self) -> list[Run]:
        return [self._runs[name] for name in sorted(self._runs)]

    async def create(self, name: str, spec: RunSpec) -> tuple[Run, bool]:
        """The run, and whether it is new. Raises RunExists when it is there with another spec."""
        limit = Manifest(spec.parameters).body_limit
        if limit > self._settings.max_body_bytes:
            raise InvalidSpec(
                f"a body of these parameters may have {limit} bytes, more than the service accepts",
                field="parameters",
            )
        async with self._creating:
            if name in self._runs:
                if self._runs[name].spec != spec:
                    raise RunExists(f"the run {name!r} exists with another spec", run=name)
                return self._runs[name], False
            run = self._make(name, spec)
            await run.create()
            self._runs[name] = run
            return run, True

    async def delete(self, name: str) -> None:
        """Raises RunNotFound."""
        async with self._creating:
            await self.get(name).delete()
            del self._runs[name]

    async def start(self) -> None:
        """Opens every run that the data directory or Redis knows, and begins housekeeping."""
        async with reachable():
            known = set(await self._store.client.smembers(RUNS_KEY))
        known |= {path.parent.name for path in (self._settings.data_dir / "runs").glob("*/run.json")}
        for name in sorted(known):
            await self._open(name)
        self._spawn(self._keep_house())

    async def close(self) -> None:
        """Writes the last checkpoints."""
        self._closing.set()
        # Not cancelled: a command cut short leaves its connection, and a checkpoint its thread, behind.
        await asyncio.gather(*self._background)
        for run in self._runs.values():
            try:
                await run.close()
            except Exception:
                logger.exception("run %s could not be closed in order", run.name)

    def _make(self, name: str, spec: RunSpec) -> Run:
        return Run(name, spec, self._settings, self._store, self._device, RunMetrics(self._metrics, name))

    async def _open(self, name: str) -> None:
        fields = await Coordinator.read_run(self._store, name)
        try:
            file = RunFile.read(self._settings.data_dir / "runs" / name)
        except (OSError, ValueError, TypeError) as error:
            if not fields:
                logger.error("run %s cannot be opened: %s", name, error)
                return
            file = None
        try:
            spec = RunSpec.model_validate_json(file.spec if file else fields["spec"])
        except ValidationError as error:
            logger.error("run %s cannot be opened, its spec is not valid: %s", name, error)
            return
        run = self._make(name, spec)
        await run.open(file, fields)
        self._runs[name] = run
        logger.info("run %s is open: epoch %d, step %d", name, run.epoch, run.step)

    async def _keep_house(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _HOUSEKEEPING_S)
            for run in self.all():
                try:
                    await run.leases.expire()
                except Exception:
                    logger.exception("the leases of run %s could not be looked after", run.name)
                if run.is_checkpoint_due():
                    self._spawn(self._checkpoint(run))

    async def _checkpoint(self, run: Run) -> None:
        try:
            await run.checkpoint()
        except (FreestepError, OSError):
            logger.exception("a checkpoint of run %s could not be written", run.name)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
