"""The runs that this service knows."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from freestep.api.models import RunSpec
from freestep.api.run_state import StateDocument
from freestep.errors import (
    CoordinatorUnavailable,
    InvalidSpec,
    RunNotFound,
    ShardUnavailable,
    StorageUnavailable,
)
from freestep.wire.header import body_limit
from freestep.wire.manifest import Manifest
from freestep_service.coordination.opening import list_again, read_run, unlist
from freestep_service.coordination.quotas import Event, SharedQuotas
from freestep_service.coordination.run_scripts import RUNS_KEY
from freestep_service.coordination.store import reachable
from freestep_service.domain.layout import NewerLayout
from freestep_service.domain.records import Origin
from freestep_service.domain.run_view import DamagedRun
from freestep_service.domain.specs import require_same_spec
from freestep_service.domain.tokens import Token
from freestep_service.runs.background import Background
from freestep_service.runs.deletions import Deletions
from freestep_service.runs.ending import remove_remnants
from freestep_service.runs.known_run import look_for_newer, read_known
from freestep_service.runs.quotas import Quotas
from freestep_service.runs.resources import Resources
from freestep_service.runs.run import Run
from freestep_service.runs.run_gauges import RunHere
from freestep_service.runs.state_imports import receive_state
from freestep_service.runs.store_watch import StoreWatch
from freestep_service.state.received_state import ReceivedState
from freestep_service.state.staging import Body
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.journal_files import runs_with_journals
from freestep_service.storage.newer_files import require_known_files

__all__ = ["Registry"]

logger = logging.getLogger("freestep")

_OPENING_S = 20.0
"""Seconds for which the start of the service waits for runs that open."""


class Registry:
    """Every run by its name.

    on_newer: told that processes of a newer layout have the Redis, so that this one is to end.
    """

    def __init__(self, resources: Resources, on_newer: Callable[[NewerLayout], None] = lambda error: None) -> None:
        self._resources = resources
        self._on_newer = on_newer
        self.watch = StoreWatch(resources.store)
        self.quotas = Quotas(SharedQuotas(resources.store), resources.settings)
        self._runs: dict[str, Run] = {}
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By run: held while it is opened, created or deleted here. Any name may be asked for."""
        self._set_aside: dict[str, Exception] = {}
        """Runs that cannot be opened, and why; each is logged once, and tried again in the background."""
        self._opening: list[asyncio.Task[None]] = []
        """Runs that were there when the service started."""
        self._stopping = asyncio.Event()
        self._background = Background("the service")

    def get(self, name: str) -> Run:
        """A run that is known here already. Raises RunNotFound."""
        run = self._runs.get(name)
        if run is None or run.is_gone:
            raise RunNotFound(f"there is no run {name!r}", run=name)
        return run

    async def find(self, name: str) -> Run:
        """A run, which another process may have created.

        Raises RunNotFound, CoordinatorUnavailable, and ShardUnavailable where the run cannot be opened.
        """
        if name not in self._runs:
            aside = self._set_aside.get(name)
            if isinstance(aside, StorageUnavailable):
                # Storage is read again in the background, and not as often as anybody asks.
                raise _cannot_be_opened(name, aside)
            async with self._change(name):
                if name not in self._runs:
                    try:
                        # A new run may take the place of one that is damaged, and of no other.
                        await self._open(name, is_from_elsewhere=aside is None or isinstance(aside, Damaged))
                    except (DamagedRun, StorageUnavailable) as error:
                        self._put_aside(name, error)
                        raise _cannot_be_opened(name, error) from None
                    except Damaged as error:
                        self._put_aside(name, error)
        return self.get(name)

    def all(self) -> list[Run]:
        """The runs that are known here, by name."""
        return [run for _, run in sorted(self._runs.items()) if not run.is_gone]

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with runs, by name: those that cannot be opened, and those whose checkpoints fail."""
        aside = {name: str(error) for name, error in self._set_aside.items()}
        return {**aside, **{run.name: run.problem for _, run in sorted(self._runs.items()) if run.problem}}

    def _here(self) -> list[RunHere]:
        """How runs stand in this process, for /metrics."""
        aside = [RunHere(name, has_problem=True) for name in self._set_aside if name not in self._runs]
        return aside + [run.here() for run in self._runs.values()]

    @property
    def lost(self) -> list[str]:
        """The runs whose state was in this process's storage, and is there no more."""
        return [run.name for run in self.all() if run.has_lost_state]

    async def create(self, name: str, spec: RunSpec, creator: Token) -> tuple[Run, bool]:
        """The run, and whether it is new.

        Raises RunExists when it is there with another spec, InvalidSpec, also where the machine has no memory for it,
        Overloaded where its creator's quota is used up, and StorageUnavailable.
        """
        resources = self._resources
        with suppress(RunNotFound):
            return self._same(await self.find(name), spec), False
        manifest = await asyncio.to_thread(Manifest.of, spec)
        limit = await asyncio.to_thread(body_limit, manifest)
        if limit > resources.settings.max_body_bytes:
            raise InvalidSpec(
                f"a body of these parameters may have {limit} bytes, more than the service accepts",
                field="parameters",
            )
        async with self._change(name):
            await self._end_if_gone(name)
            if name in self._runs:
                return self._same(self._runs[name], spec), False
            try:
                await look_for_newer(resources, require_known_files, name)
            except NewerFormat as error:
                raise _cannot_be_opened(name, error) from None
            await resources.disk.run(resources.storage.require_writable)
            await resources.node.heartbeat(resources.store)
            resources.memory.reserve(
                name, await resources.bytes_of(spec, resources.node.share(spec.shards), spec.shards)
            )
            is_counted = False
            try:
                is_counted = await self.quotas.take_run(creator, name, manifest.numel)
                origin = Origin(
                    await Deletions(resources, name).first_epoch(),
                    secrets.token_hex(8),
                    creator.id if is_counted else "",
                )
                run = Run(name, spec, manifest, spec.shards, resources, origin)
                is_new = await run.create()
                if is_counted:
                    event: Event = "made" if is_new else "failed"
                    # What follows may fail, and is no part of its making.
                    is_counted = False
                    await self.quotas.settle_run(creator.id, name, event, origin.id, manifest.numel)
                if not is_new:
                    await self._open(name, is_from_elsewhere=True)
                    return self.get(name), False
            except BaseException:
                resources.memory.cancel(name)
                if is_counted:
                    with suppress(CoordinatorUnavailable):
                        await self.quotas.settle_run(creator.id, name, "failed")
                raise
            self._runs[name] = run
            self._set_aside.pop(name, None)
            logger.info(
                "run %s is created: %s, %s, durability %s, %d parameters in %d shards",
                *(
                    name,
                    spec.optimizer.algorithm,
                    spec.aggregation.policy,
                    spec.durability,
                    manifest.numel,
                    spec.shards,
                ),
            )
            await run.start()
            if resources.node.live_peers:
                await resources.channels.publish({"kind": "created", "run": name})
            return run, True

    async def receive_state(self, body: Body, accept: Callable[[StateDocument], None]) -> ReceivedState:
        """As `state_imports.receive_state`, of the whole state of a run that need not exist."""
        return await receive_state(self._resources, body, accept)

    def _same(self, run: Run, spec: RunSpec) -> Run:
        require_same_spec(run.name, spec, run.spec)
        return run

    async def delete(self, name: str, run_id: str = "") -> None:
        """Deletes a run; one that is deleted, and not yet removed everywhere, is removed.

        run_id: the only run of the name that may be deleted; empty for any.

        Raises RunNotFound, and StorageUnavailable, also where a newer version has written some of its files. What could
        not be removed of a run that is deleted is removed later, in the background.
        """
        async with self._change(name):
            was_there = await self._end_if_gone(name)
        try:
            await self.find(name)
        except RunNotFound:
            if was_there:
                return
            raise
        async with self._change(name):
            run = self.get(name)
            if run_id not in ("", run.origin.id):
                raise RunNotFound(f"the run {name!r} is another than that of the id {run_id!r}", run=name)
            try:
                await look_for_newer(self._resources, require_known_files, name)
            except NewerFormat:
                raise
            except StorageUnavailable as error:
                # It is deleted all the same, as far as it can be.
                logger.warning("run %s: what is deleted of it cannot all be read: %s", name, error)
            await run.ending.delete(run_id)
            logger.info("run %s is deleted", name)
            await self._end_if_gone(name)

    async def _end_if_gone(self, name: str) -> bool:
        """Ends a run that is deleted, so that another may have its name; whether there was one. Its lock is held.

        Raises CoordinatorUnavailable and StorageUnavailable; what is then left to be done is done in the background.
        """
        run = self._runs.get(name)
        if run is None or not run.is_gone:
            return False
        try:
            await run.ending.forget()
        finally:
            self._resources.memory.cancel(name)
        if run.origin.creator:
            with suppress(CoordinatorUnavailable):
                # Else it is found to be no more.
                await self.quotas.settle_run(run.origin.creator, name, "ended", run.origin.id)
        del self._runs[name]
        return True

    async def _end_later(self, name: str) -> None:
        """As `_end_if_gone`; what cannot be done is the run's problem, and is tried again."""
        async with self._change(name):
            with suppress(CoordinatorUnavailable, StorageUnavailable):
                await self._end_if_gone(name)

    def _change(self, name: str) -> asyncio.Lock:
        return self._changing.setdefault(name, asyncio.Lock())

    # The life of the service

    async def start(self) -> None:
        """Opens every run that storage or Redis knows, as far as it is for this process to."""
        resources = self._resources
        resources.metrics.runs.standings = self._here
        await resources.node.heartbeat(resources.store)
        await resources.channels.start(self._on_message)
        # Of a run that was deleted while this host was away, its journals are all that is left.
        names = await self._names() | set(await resources.disk.run(runs_with_journals, resources.settings.journals()))
        self._opening = [asyncio.create_task(self._try_to_open(name)) for name in sorted(names)]
        if self._opening:
            await asyncio.wait(self._opening, timeout=_OPENING_S)
        self._background.spawn(self._beat(), "runs of other processes are not looked for any more")
        self._background.spawn(self._retry(), "runs that cannot be opened are not tried again any more")

    async def close(self) -> None:
        """Writes the last checkpoints."""
        self._stopping.set()
        await self._background.settle()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        runs = list(self._runs.values())
        ending = (self._end_later(run.name) if run.is_gone else run.ending.close() for run in runs)
        closing = await asyncio.gather(*ending, return_exceptions=True)
        for run, error in zip(runs, closing, strict=True):
            if error is not None:
                logger.error("run %s could not be closed in order", run.name, exc_info=error)
        await self._resources.channels.close()
        with suppress(CoordinatorUnavailable):
            await self._resources.node.leave(self._resources.store)
        self._resources.disk.close()
        self._resources.locks.close()

    async def _names(self) -> set[str]:
        with reachable():
            known = set(await self._resources.store.client.smembers(RUNS_KEY))
        return known | set(await self._resources.disk.run(self._resources.storage.names, "runs"))

    async def _try_to_open(self, name: str) -> None:
        """Opens a run, unless it is open; one that cannot be is set aside, and the others go on."""
        try:
            async with self._change(name):
                if name not in self._runs:
                    await self._open(name)
        except (CoordinatorUnavailable, StorageUnavailable, Damaged) as error:
            self._put_aside(name, error)
        except Exception as error:
            self._put_aside(name, error, is_expected=False)

    async def _open(self, name: str, *, is_from_elsewhere: bool = False) -> None:
        """Opens a run that there is. is_from_elsewhere: not one that is in storage alone.

        Raises DamagedRun, CoordinatorUnavailable, NewerFormat, also where this version does not know what the spec
        names, and StorageUnavailable or Damaged where it is in storage alone and cannot be read.
        """
        view = await read_run(self._resources.store, name)
        if view is None and is_from_elsewhere:
            return
        known = await read_known(self._resources, name, view)
        if known is None:
            self._set_aside.pop(name, None)
            await remove_remnants(self._resources, name)
            return
        spec, shards, origin = known
        # It was there before: it is opened all the same.
        self._resources.count(name, await self._resources.bytes_of(spec, self._resources.node.share(shards), shards))
        manifest = await asyncio.to_thread(Manifest.of, spec)
        run = Run(name, spec, manifest, shards, self._resources, origin)
        self._runs[name] = run
        self._set_aside.pop(name, None)
        if origin.creator:
            await self.quotas.settle_run(origin.creator, name, "kept", origin.id, manifest.numel)
        await run.start()

    def _put_aside(self, name: str, error: Exception, *, is_expected: bool = True) -> None:
        before, self._set_aside[name] = self._set_aside.get(name), error
        if before is None or str(before) != str(error):
            logger.error("run %s cannot be opened: %s", name, error, exc_info=None if is_expected else error)

    def _on_message(self, message: dict[str, Any] | None) -> None:
        if message is not None and message["kind"] == "created":
            self._background.spawn(self._look_at(message["run"]), f"run {message['run']} was not opened")

    async def _look_at(self, name: str) -> None:
        # Why one cannot be opened `find` has logged.
        with suppress(CoordinatorUnavailable, ShardUnavailable):
            try:
                await self.find(name)
            except RunNotFound:
                # It was deleted as it was listed, or its creation failed.
                await unlist(self._resources.store, name)

    async def _beat(self) -> None:
        """Registers this process as live, and notices what others have created or deleted."""
        resources = self._resources
        while not self._stopping.is_set():
            try:
                await self.watch.look()
                await resources.node.heartbeat(resources.store)
                await self._list_again()
                if resources.node.live_peers:
                    for name in sorted(await self._names() - self._runs.keys() - self._set_aside.keys()):
                        await self._look_at(name)
            except (CoordinatorUnavailable, StorageUnavailable):
                # Where Redis is away, the runs say so in the log.
                if resources.node.newer is not None:
                    self._on_newer(resources.node.newer)
            except Exception:
                logger.exception("other processes' runs could not be looked for")
            for run in list(self._runs.values()):
                if run.is_gone and not self._change(run.name).locked():
                    self._background.spawn(self._end_later(run.name), f"run {run.name} is not ended")
            await self._stops(resources.node.heartbeat_s)

    async def _list_again(self) -> None:
        """Lists the runs here where Redis has lost its lists: that of all, and those of their creators' quotas."""
        runs = self.all()
        await list_again(self._resources.store, [run.name for run in runs])
        counted: dict[str, dict[str, tuple[str, int]]] = {}
        for run in runs:
            if run.origin.creator and run.owns(0):
                counted.setdefault(run.origin.creator, {})[run.name] = run.origin.id, run.manifest.numel
        for creator, its_runs in counted.items():
            await self.quotas.list_again(creator, its_runs)

    async def _retry(self) -> None:
        """Tries again to open what is set aside, one run after another, and rests as long as that takes."""
        clock = asyncio.get_running_loop().time
        took_s = 0.0
        while not await self._stops(max(self._resources.node.heartbeat_s, took_s)):
            begun = clock()
            for name in sorted(self._set_aside):
                if not self._stopping.is_set():
                    await self._try_to_open(name)
            took_s = clock() - begun

    async def _stops(self, pause_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        return self._stopping.is_set()


def _cannot_be_opened(name: str, error: Exception) -> ShardUnavailable:
    return ShardUnavailable(f"the run {name!r} cannot be opened: {error}", missing=[])
