"""What evaluators report of a run: metrics, which become entries of its log."""

from __future__ import annotations

import asyncio
from typing import Any

from freestep.api.models import Metric, MetricReceipt, MetricReport
from freestep.errors import CoordinatorUnavailable
from freestep_service.domain.records import LogPosition
from freestep_service.domain.reports import Measured
from freestep_service.runs.context import RunContext
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery

__all__ = ["MetricReports"]

_POLL_S = 0.01


class MetricReports:
    """The metrics of one run, as the owner of a shard of it takes them."""

    def __init__(self, context: RunContext, recovery: Recovery, shards: OwnedShards, dispatch: Dispatch) -> None:
        self._coordinator = context.coordinator.log
        self._recovery = recovery
        self._shards = shards
        self._dispatch = dispatch

    async def report(self, report: MetricReport) -> MetricReceipt:
        """Counts a report, unless it was counted before.

        Raises IdempotencyConflict, MalformedRequest, EpochChanged, RunNotInitialized and ShardUnavailable; under
        durability `journal`, StorageUnavailable where it may have counted and is not on disk.
        """
        measured = Measured(report.name, report.step, report.value)

        async def ask() -> tuple[int, dict[str, Any] | None, bool]:
            core = self._shards.require_any().core
            era = core.writer.era
            epoch, entry = await self._coordinator.report_metric(core.owner(), measured, report.epoch)
            return epoch, entry, era == core.writer.era

        while True:
            try:
                epoch, entry, holds = await self._recovery.call(ask)
            except CoordinatorUnavailable:
                self._recovery.catch_up()
                raise
            # Else it is the answer of a Redis that has lost it since.
            if holds:
                break
        if entry is not None:
            self._dispatch.on_entry(entry)
            await self._journaled(LogPosition(entry["epoch"], entry["seq"]))
        return MetricReceipt(**measured._asdict(), epoch=epoch, replayed=entry is None)

    async def _journaled(self, place: LogPosition) -> None:
        """Returns when an entry is in the journals that are here; those of others have it then, or learn of it."""
        for shard in self._shards:
            journal, writer = shard.core.journal, shard.core.writer
            while journal is not None and writer.epoch == place.epoch and writer.taken_seq < place.seq:
                await journal.flush()
                # An entry before it may be on its way.
                await asyncio.sleep(_POLL_S if writer.taken_seq < place.seq else 0)

    async def newest(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        return await self._coordinator.metrics()
