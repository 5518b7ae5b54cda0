"""What evaluators report of a run: metrics, which become entries of its log."""

from __future__ import annotations

from typing import Any

from freestep.api.models import Metric, MetricReceipt, MetricReport
from freestep.errors import CoordinatorUnavailable
from freestep_service.domain.reports import Measured
from freestep_service.runs.context import RunContext
from freestep_service.runs.dispatch import Dispatch
from freestep_service.runs.owned_shards import OwnedShards
from freestep_service.runs.recovery import Recovery

__all__ = ["MetricReports"]


class MetricReports:
    """The metrics of one run, as the owner of a shard of it takes them."""

    def __init__(self, context: RunContext, recovery: Recovery, shards: OwnedShards, dispatch: Dispatch) -> None:
        self._coordinator = context.coordinator.log
        self._recovery = recovery
        self._shards = shards
        self._dispatch = dispatch

    async def report(self, report: MetricReport) -> MetricReceipt:
        """Counts a report, unless it was counted before.

        Raises IdempotencyConflict, MalformedRequest, EpochChanged, RunNotInitialized and ShardUnavailable.
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
        return MetricReceipt(**measured._asdict(), epoch=epoch, replayed=entry is None)

    async def newest(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        return await self._coordinator.metrics()
