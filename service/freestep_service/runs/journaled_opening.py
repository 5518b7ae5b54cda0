"""What the journals of a run have to say when it opens: a shard's own, and what the others lack.

The law of this file: what any shard's journal has of the log is decided, and all have their parts of it on disk. So
every shard takes it, before the run goes on. Where a repair has given up such parts, all go back to the newest entry
that every shard has, and the run goes on from there in a new epoch.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.opening import Exchange, Report
from freestep_service.domain.records import CheckpointId
from freestep_service.domain.run_view import RunView
from freestep_service.runs.checkpointing import Checkpointing
from freestep_service.runs.context import RunContext
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.replay import recover
from freestep_service.runs.shard_core import Refusal
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import fingerprint

__all__ = ["exchange_entries", "go_back", "settle"]

logger = logging.getLogger("freestep")

_RECOVERED = 0
"""The generation of a state that a shard has from its journal, before any opening."""
_CATCHING_UP_S = 3.0
"""Seconds for which a shard waits until what others have is in its journal."""
_POLL_S = 0.05


async def settle(context: RunContext, checkpoints: Checkpoints, shard: LocalShard, newest_epoch: int) -> None:
    """Has a shard apply what is on disk: its journal where it holds no state, else what was written last.

    newest_epoch: of the run, as far as is known. Raises as `recover`; again without reading anything where neither the
    journal nor the checkpoints have changed since.
    """
    core = shard.core
    assert core.journal is not None
    if core.loaded is not None:
        with suppress(StorageUnavailable, ShardUnavailable):
            await core.journal.flush()
        return
    if (refusal := core.refusal) is not None and refusal.evidence == await _evidence(context, checkpoints, shard):
        raise refusal.error
    try:
        is_recovered = await recover(context, checkpoints, shard, newest_epoch)
    except Damaged as error:
        with suppress(StorageUnavailable, ShardUnavailable):
            await core.journal.flush()
        evidence = await _evidence(context, checkpoints, shard)
        # A repair that came meanwhile has taken it over.
        core.refusal = Refusal(evidence, error) if await core.journal.is_present_owner() else None
        raise
    core.refusal = None
    if is_recovered:
        core.loaded = _RECOVERED
        # Else it would count at a later opening, whatever the journal has beyond it.
        await context.resources.disk.run(checkpoints.clear_closed, core.manifest.begin, core.manifest.end)


async def _evidence(context: RunContext, checkpoints: Checkpoints, shard: LocalShard) -> object:
    """What a journal is refused by: its files, and the checkpoints that it could follow."""
    core, disk = shard.core, context.resources.disk
    assert core.journal is not None
    offers = await disk.run(checkpoints.offers, core.manifest.begin, core.manifest.end)
    return await disk.run(fingerprint, core.journal.directory), tuple(offers)


async def exchange_entries(
    context: RunContext, shard: LocalShard, view: RunView, *, is_paused: bool
) -> tuple[CheckpointId, list[dict[str, Any]]]:
    """Takes what other shards have reported of the log; where the shard stands then, and what its own journal has.

    is_paused: whether the shard's writer takes no entries.
    """
    core, writer = shard.core, shard.core.writer
    assert core.journal is not None
    if is_paused:
        # Nothing else comes while the run is closed.
        seq, step, _ = await writer.run(core.shard.position)
        writer.resume(writer.epoch, seq, step)
    for entry in _shared(view, writer.epoch):
        if entry["seq"] > writer.taken_seq and not shard.take_entry(entry):
            logger.error("run %s: shard %d has no part of entry %d", context.name, shard.index, entry["seq"])
            break
    with suppress(TimeoutError):
        async with asyncio.timeout(_CATCHING_UP_S):
            while writer.has_gap or writer.taken_seq < writer.position.seq:
                await asyncio.sleep(_POLL_S)
    await core.journal.flush()
    seq, step, _ = await writer.run(core.shard.position)
    exchange = Exchange.of(view)
    assert exchange is not None
    return CheckpointId(writer.epoch, step, seq), await core.journal.entries(exchange.seq)


async def go_back(
    context: RunContext,
    checkpoints: Checkpoints,
    checkpointing: Checkpointing,
    shard: LocalShard,
    newest_epoch: int,
    seq: int,
) -> None:
    """Brings a shard back to an entry, and leaves its state of then as a part of a checkpoint.

    A shard that cannot be brought there leaves none. Raises as `recover`, and StorageUnavailable and Fenced.
    """
    core, writer = shard.core, shard.core.writer
    place, _, _ = await writer.run(core.shard.position)
    if place > seq:
        core.loaded = None
        if not await recover(context, checkpoints, shard, newest_epoch, seq):
            return
        core.loaded = _RECOVERED
    copy = await writer.run(core.shard.copy_state)
    if copy.seq == seq:
        identity = CheckpointId(copy.epoch, copy.step, copy.seq)
        size = await checkpointing.write(shard, copy)
        if await context.coordinator.log.part_written(core.owner(), identity, size):
            await context.resources.disk.run(checkpoints.complete, identity)


def _shared(view: RunView, epoch: int) -> list[dict[str, Any]]:
    """The entries of an epoch that shards have reported, in the order of the log."""
    shared: dict[int, dict[str, Any]] = {}
    for index in range(view.count):
        _, _, report = (view.field(index, "report") or "").partition(" ")
        if report:
            shared |= {entry["seq"]: entry for entry in Report.from_json(report).entries if entry["epoch"] == epoch}
    return [shared[seq] for seq in sorted(shared)]
