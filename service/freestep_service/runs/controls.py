"""Changes of a run while it trains, which become entries of its log, and workers whose leases an operator ends.

The law of this file: what is acknowledged is in the log, and under every durability but `none` it is on disk with the
weights that came before it. What is refused has changed nothing.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import ValidationError

from freestep.api.control import ControlRequest
from freestep.api.models import RunSpec, WorkerEnd
from freestep.errors import FreestepError, InvalidSpec, ShardUnavailable
from freestep_service.coordination.leases import EndedWorker
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control
from freestep_service.domain.records import Owner
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.log_appends import LogAppends
from freestep_service.runs.owned_shards import OwnedShards

__all__ = ["Controls"]

logger = logging.getLogger("freestep")


class Controls:
    """The changes of one run, as the owner of a shard of it takes them."""

    def __init__(
        self, context: RunContext, shards: OwnedShards, appends: LogAppends, checkpointing: Checkpointing
    ) -> None:
        self._context = context
        self._opening = context.coordinator.opening
        self._log = context.coordinator.log
        self._leases = context.coordinator.leases
        self._shards = shards
        self._appends = appends
        self._checkpointing = checkpointing
        self._is_unsaved = False
        """Whether a change has counted that no checkpoint has."""

    async def change(self, wish: ControlRequest, key: str, by: str) -> None:
        """Makes a change, unless there is nothing to change or it was made before under this key.

        key: the request's idempotency key, empty if it has none. by: the name of the token that asks for it. Raises
        InvalidSpec, IdempotencyConflict, RunNotInitialized, as `LogAppends.append`, and StorageUnavailable where it has
        counted and is not in a checkpoint.
        """
        asked = wish.model_dump_json(exclude_defaults=True)
        while True:
            view = await self._opening.read()
            if view is None:
                raise ShardUnavailable("the run is being opened")
            before = Control.of(view.run)
            after, spec = await self._after(before, wish, key)
            if after == before:
                break
            policy = Policy.of(spec.aggregation)

            async def ask(
                owner: Owner, before: Control = before, after: Control = after, policy: Policy = policy
            ) -> tuple[None, dict[str, Any] | None]:
                return None, await self._log.change_run(owner, before, after, policy, asked, by)

            try:
                _, is_made = await self._appends.append(ask)
            except FreestepError:
                await self._count_memory(before)
                raise
            if is_made:
                logger.info("run %s is changed by %s: %s", self._context.name, by, asked, extra={"by": by})
                self._is_unsaved = True
                break
        await self._save()

    async def _after(self, before: Control, wish: ControlRequest, key: str) -> tuple[Control, RunSpec]:
        """What is changed after a request, and the spec that is then in force; memory and kernels are ready for it."""
        try:
            after = before.after(self._context.spec, wish, key)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InvalidSpec(f"{field}: {first['msg']}", field=field) from None
        spec = after.in_force(self._context.spec)
        if after != before and spec != before.in_force(self._context.spec):
            resources = self._context.resources
            resources.memory.reserve(self._context.name, await resources.bytes_of(spec, self._shards.count))
            for shard in self._shards:
                await shard.core.prepare(spec)
        return after, spec

    async def _count_memory(self, control: Control) -> None:
        resources, spec = self._context.resources, control.in_force(self._context.spec)
        await resources.count_anew(self._context.name, spec, self._shards.count)

    async def _save(self) -> None:
        """Has what has changed in a checkpoint, or in a journal, where it is already."""
        if not self._is_unsaved or self._context.keeps_journal or not self._context.keeps_checkpoints:
            return
        await self._checkpointing.write_now()
        self._is_unsaved = False

    async def end_worker(self, worker: str, ban_s: int | None, by: str) -> WorkerEnd:
        """Ends a worker's lease, if it has one, and refuses it another for so long, if that is given; 0 lifts that.

        Raises RunNotInitialized, MalformedRequest, as `LogAppends.append`, and StorageUnavailable as `change`.
        """
        asked = json.dumps({"worker": worker, "ban": ban_s})
        lease = await self._leases.newest_lease(worker)
        while True:

            async def ask(owner: Owner, lease: str = lease) -> tuple[EndedWorker, dict[str, Any] | None]:
                found = await self._leases.end_worker(owner, worker, lease, ban_s, asked, by)
                return found, found.entry

            found, _ = await self._appends.append(ask)
            if found.newer_lease is None:
                break
            lease = found.newer_lease
        self._context.receipts.forget(found.evicted)
        if found.had_lease:
            self._context.telemetry.leased("ended")
            fields = {"worker": worker, "change": "ended", "by": by}
            logger.info("run %s: the lease of worker %s is ended by %s", self._context.name, worker, by, extra=fields)
        if found.had_lease and not self._shards.is_sharded:
            self._context.events.lease("ended", worker)
        if ban_s is not None:
            self._is_unsaved = True
            await self._save()
        return WorkerEnd(worker=worker, ended=found.had_lease, suspended_ms=None if ban_s is None else 1000 * ban_s)
