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
from freestep.api.models import WorkerEnd
from freestep.api.validation import first_fault
from freestep.errors import InvalidSpec
from freestep_service.coordination.leases import EndedWorker
from freestep_service.coordination.run_scripts import not_open
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control
from freestep_service.domain.records import Behind, Owner
from freestep_service.domain.run_view import RunView
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.log_appends import LogAppends
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.run_memory import RunMemory

__all__ = ["Controls"]

logger = logging.getLogger("freestep")


class Controls:
    """The changes of one run, as the owner of a shard of it takes them."""

    def __init__(
        self,
        context: RunContext,
        recovery: Recovery,
        shards: OwnedShards,
        memory: RunMemory,
        appends: LogAppends,
        checkpointing: Checkpointing,
    ) -> None:
        self._context = context
        self._recovery = recovery
        self._opening = context.coordinator.opening
        self._log = context.coordinator.log
        self._leases = context.coordinator.leases
        self._shards = shards
        self._memory = memory
        self._appends = appends
        self._checkpointing = checkpointing

    async def change(self, wish: ControlRequest, key: str, by: str) -> None:
        """Makes a change, unless there is nothing to change or it was made before under this key.

        key: the request's idempotency key, empty if it has none. by: the name of the token that asks for it. Raises
        InvalidSpec, IdempotencyConflict, RunNotInitialized, as `LogAppends.append`, and as `Checkpointing.write_now`
        where it has counted and is not in a checkpoint. A repetition is answered once it is on disk, too.
        """
        asked = wish.model_dump_json(exclude_defaults=True)
        while True:
            view = await self._recovery.call(self._standing)
            before = Control.of(view.run)
            after = self._after(before, wish, key)
            if after == before:
                await self._require_kept(view)
                return
            if await self._make(before, after, asked, by):
                logger.info("run %s is changed by %s: %s", self._context.name, by, asked, extra={"by": by})
                await self._save()
                return

    async def _standing(self) -> RunView:
        """How the run stands in a Redis that has all that its shards have: else it may have lost what was changed.

        Raises Behind, and ShardUnavailable where the run is not open.
        """
        known = self._shards.require_any().core.writer.position
        view = await self._opening.read()
        if view is None or view.position < known:
            raise Behind
        if view.phase != "open":
            raise not_open(self._context.name, view.missing())
        return view

    def _after(self, before: Control, wish: ControlRequest, key: str) -> Control:
        """What is changed after a request. Raises InvalidSpec and IdempotencyConflict."""
        try:
            return before.after(self._context.spec, wish, key)
        except ValidationError as error:
            place, why = first_fault(error)
            field = ".".join(map(str, place))
            raise InvalidSpec(f"{field}: {why}", field=field) from None

    async def _make(self, before: Control, after: Control, asked: str, by: str) -> bool:
        """Has a change in the log, with memory and kernels ready for it; False if something was changed meanwhile."""
        spec = after.in_force(self._context.spec)

        async def ask(owner: Owner) -> tuple[None, dict[str, Any] | None]:
            return None, await self._log.change_run(owner, before, after, Policy.of(spec.aggregation), asked, by)

        try:
            async with self._memory.room_for(spec):
                if spec != before.in_force(self._context.spec):
                    for shard in self._shards:
                        await shard.core.prepare(spec)
                _, is_made = await self._appends.append(ask)
        finally:
            self._context.known_leases.forget()
        return is_made

    async def _require_kept(self, view: RunView) -> None:
        """Has on disk what has counted before, here or at another process, and may not have come there."""
        if self._context.keeps_journal:
            await self._appends.on_disk(view.position)
        elif Control.of(view.run) != self._checkpointing.control:
            await self._save()

    async def _save(self) -> None:
        """Has what has changed in a checkpoint, or in a journal, where it is already."""
        if self._context.keeps_checkpoints and not self._context.keeps_journal:
            await self._checkpointing.write_now()

    async def end_worker(self, worker: str, ban_s: int | None, by: str, key: str = "") -> WorkerEnd:
        """Ends a worker's lease, if it has one, and refuses it another for so long, if that is given; 0 lifts that.

        key: the request's idempotency key, empty if it has none. Raises RunNotInitialized, MalformedRequest, as
        `LogAppends.append`, and what `change` does.
        """
        asked = json.dumps({"worker": worker, "ban": ban_s})
        lease = await self._leases.newest_lease(worker)
        while True:

            async def ask(owner: Owner, lease: str = lease) -> tuple[EndedWorker, dict[str, Any] | None]:
                found = await self._leases.end_worker(owner, worker, lease, ban_s, asked, by, key)
                return found, found.entry

            try:
                found, _ = await self._appends.append(ask)
            finally:
                self._context.known_leases.forget()
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
        if ban_s is not None and found.entry is None:
            # It had counted before, and may not be on disk.
            await self._require_kept(await self._recovery.call(self._standing))
        elif ban_s is not None:
            await self._save()
        return WorkerEnd(worker=worker, ended=found.had_lease, suspended_ms=None if ban_s is None else 1000 * ban_s)
