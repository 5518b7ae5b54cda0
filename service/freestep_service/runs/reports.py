"""What evaluators report of a run: metrics, which become entries of its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from freestep.api.models import Metric, MetricReceipt, MetricReport
from freestep.errors import CoordinatorUnavailable, ShardUnavailable
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.domain.records import Behind, Fenced
from freestep_service.domain.reports import Measured
from freestep_service.runs.leases import Leases
from freestep_service.runs.local_shard import LocalShard

__all__ = ["MetricReports"]


class _Host(Protocol):
    """What is asked of the run."""

    leases: Leases

    @property
    def owned(self) -> Mapping[int, LocalShard]:
        """The shards that this process owns."""

    def shard(self, index: int) -> LocalShard:
        """Raises ShardUnavailable."""

    def fenced(self) -> None:
        """Somebody else owns a shard."""

    async def reopen(self) -> None:
        """Has the run opened again, because Redis has lost its data."""

    def on_entry(self, entry: dict[str, Any]) -> None:
        """Takes an entry of the log."""


class MetricReports:
    """The metrics of one run, as the owner of a shard of it takes them."""

    def __init__(self, coordinator: Coordinator, host: _Host) -> None:
        self._coordinator = coordinator
        self._host = host

    async def report(self, report: MetricReport) -> MetricReceipt:
        """Has a report counted, unless it was before.

        Raises IdempotencyConflict, MalformedRequest, EpochChanged, RunNotInitialized and ShardUnavailable.
        """
        measured = Measured(report.name, report.step, report.value)
        while True:
            owned = self._host.shard(min(self._host.owned, default=0))
            era = owned.writer.era
            try:
                epoch, entry = await self._coordinator.log.report_metric(owned.owner(), measured, report.epoch)
            except Behind:
                await self._host.reopen()
                continue
            except Fenced:
                self._host.fenced()
                raise ShardUnavailable from None
            except CoordinatorUnavailable:
                self._host.leases.look_out()
                raise
            if era != owned.writer.era:
                # Said by a Redis that has lost it since.
                continue
            if entry is not None:
                self._host.on_entry(entry)
            return MetricReceipt(**measured._asdict(), epoch=epoch, replayed=entry is None)

    async def newest(self) -> dict[str, Metric]:
        """Each metric at its newest step, by name."""
        return await self._coordinator.log.metrics()
