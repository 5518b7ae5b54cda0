"""A shard's way back after its process has ended: the newest checkpoint, then its journal, entry by entry.

The law of this file: a replayed entry is applied as it was the first time, by the same writer, from the same bytes.
"""

from __future__ import annotations

import logging

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.runs.context import RunContext
from freestep_service.runs.local_shard import LocalShard
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_reader import JournalContents

__all__ = ["recover"]

logger = logging.getLogger("freestep")


async def recover(
    context: RunContext, checkpoints: Checkpoints, shard: LocalShard, newest_epoch: int, until: int | None = None
) -> bool:
    """Brings a shard to the newest entry of its journal, or to entry `until`; whether that is where it stands now.

    newest_epoch: of the run, as far as is known: a journal of an earlier one has nothing to add. Raises Damaged where
    entries of the journal cannot be applied, which nobody may decide to lose but its owner, and StorageUnavailable.
    """
    core, disk = shard.core, context.resources.disk
    assert core.journal is not None
    contents = await core.journal.read()
    if contents.epoch == 0 or contents.epoch < newest_epoch:
        return False
    begin, end = core.manifest.begin, core.manifest.end
    offers = await disk.run(checkpoints.offers, begin, end)
    if any(offer.epoch > contents.epoch for offer in offers):
        return False
    last = contents.newest_seq if until is None else until
    for checkpoint in [offer for offer in reversed(offers) if contents.follows(offer)]:
        if until is not None and checkpoint.seq > until:
            continue
        try:
            loaded = await disk.run(checkpoints.load, checkpoint, begin, end)
        except Damaged:
            continue
        await core.prepare(loaded.state.control.in_force(context.spec))
        core.writer.pause()
        await core.load(loaded.state, contents.epoch)
        context.receipts.clear()
        context.receipts.update(loaded.receipts)
        core.initialized = True
        core.is_repaired = contents.repaired >= contents.epoch
        newest = max(contents.newest_seq, checkpoint.seq)
        if contents.newest_seq < checkpoint.seq:
            # A repair has given up entries that the checkpoint has.
            await core.journal.begin(contents.epoch, checkpoint, checkpoint.seq)
        else:
            core.journal.go_on()
        if core.index == 0:
            await context.history.begin()
            context.events.begin(contents.epoch, checkpoint.seq, checkpoint.step)
        core.writer.resume(contents.epoch, checkpoint.seq, checkpoint.step, newest)
        with context.history.replaying():
            await _replay(context, shard, contents, checkpoint, last)
        context.telemetry.tally = await core.writer.run(core.shard.tally)
        if core.index == 0:
            context.telemetry.resumed(context.telemetry.tally)
        return True
    if until is None and (contents.entries or contents.start > 0):
        first = contents.entries[0].seq if contents.entries else contents.start + 1
        raise Damaged(
            f"the journal of shard {core.index} goes on from entry {first} of epoch {contents.epoch}, and no "
            "checkpoint before it can be read: bring that back, or `freestep journal repair --discard` gives the "
            "journal up"
        )
    return False


async def _replay(
    context: RunContext,
    shard: LocalShard,
    contents: JournalContents,
    checkpoint: CheckpointId,
    last: int,
) -> None:
    """Applies the entries behind a checkpoint up to the `last` one."""
    writer = shard.core.writer
    entries = [entry for entry in contents.after(checkpoint.seq) if entry.seq <= last]
    for entry in entries:
        context.receipts.take(entry.members)
        await shard.restore(entry.members, entry.part)
        if writer.failure is not None:
            raise ShardUnavailable(f"entry {entry.seq} of the journal cannot be applied: {writer.failure}")
    await writer.run(shard.core.shard.position)
    if entries:
        logger.warning(
            "run %s: shard %d has replayed %d entries behind its checkpoint of step %d",
            context.name, shard.index, len(entries), checkpoint.step,
        )  # fmt: skip
