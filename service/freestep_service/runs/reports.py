"""What evaluators report of a run: metrics, which become entries of its log."""

from __future__ import annotations

from freestep.api.models import Metric, MetricReceipt, MetricReport
from freestep_service.domain.reports import Measured
from freestep_service.runs.context import RunContext
from freestep_service.runs.log_appends import LogAppends

__all__ = ["MetricReports"]


class MetricReports:
    """The metrics of one run, as the owner of a shard of it takes them."""

    def __init__(self, context: RunContext, appends: LogAppends) -> None:
        self._coordinator = context.coordinator.log
        self._appends = appends

    async def report(self, report: MetricReport) -> MetricReceipt:
        """Counts a report, unless it was counted before.

        Raises IdempotencyConflict, MalformedRequest, EpochChanged, RunNotInitialized, and as `LogAppends.append`.
        """
        measured = Measured(report.name, report.step, report.value)
        epoch, is_new = await self._appends.append(
            lambda owner: self._coordinator.report_metric(owner, measured, report.epoch)
        )
        return MetricReceipt(**measured._asdict(), epoch=epoch, replayed=not is_new)

    async def newest(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        return await self._coordinator.metrics()
