"""What /metrics has of how runs stand at the moment: asked for when it is exposed, so that it costs nothing before.

The law of this file: a gauge is made of what is here at that moment. Of a run whose shards are elsewhere by now
nothing is told that was so once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["RunGauges", "RunHere"]


class RunHere(NamedTuple):
    """How a run stands in this process, or what cannot be opened of it.

    step, epoch: None where no shard is here that has its state. is_paused, loss, metrics, checkpoint_step,
    checkpoint_overdue_s: None, and empty, where the first shard is not. journal_bytes, journal_lag_bytes: None where no
    journal is here.
    """

    run: str
    has_problem: bool
    shards: int = 0
    step: int | None = None
    epoch: int | None = None
    is_paused: bool | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = {}
    checkpoint_step: int | None = None
    checkpoint_overdue_s: float | None = None
    event_readers: int = 0
    journal_bytes: int | None = None
    journal_lag_bytes: int | None = None


_GAUGES: Sequence[tuple[str, str, Callable[[RunHere], float | None]]] = (
    ("freestep_run_problem", "1 where something is wrong with a run, as /readyz says it.", lambda run: run.has_problem),
    ("freestep_shards", "Shards of a run that this process owns.", lambda run: run.shards),
    ("freestep_step", "The newest step.", lambda run: run.step),
    ("freestep_epoch", "The epoch.", lambda run: run.epoch),
    ("freestep_paused", "1 while a run is paused.", lambda run: run.is_paused),
    ("freestep_loss", "Moving average of reported losses.", lambda run: run.loss),
    ("freestep_checkpoint_step", "Step of the newest checkpoint.", lambda run: run.checkpoint_step),
    (
        "freestep_checkpoint_overdue_seconds",
        "Seconds by which a checkpoint is later than the service is set to write it.",
        lambda run: run.checkpoint_overdue_s,
    ),
    ("freestep_event_readers", "Connections that read a run's events.", lambda run: run.event_readers),
    ("freestep_journal_bytes", "Bytes of the journals of a run's shards here.", lambda run: run.journal_bytes),
    (
        "freestep_journal_lag_bytes",
        "Bytes of those that are not known to be on disk yet.",
        lambda run: run.journal_lag_bytes,
    ),
)


class RunGauges(Collector):
    """The gauges of runs, as `standings` was when `look` was called last."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.standings: Callable[[], Iterable[RunHere]] = lambda: ()
        """How the runs stand; to be called on the event loop."""
        self._seen: list[RunHere] = []
        registry.register(self)

    def look(self) -> None:
        """Looks how runs stand."""
        self._seen = list(self.standings())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        seen = self._seen
        for name, documentation, value_of in _GAUGES:
            family = GaugeMetricFamily(name, documentation, labels=["run"])
            for run in seen:
                if (value := value_of(run)) is not None:
                    family.add_metric([run.run], value)
            yield family
        measured = GaugeMetricFamily("freestep_metric", "Metrics that evaluators report.", labels=["run", "name"])
        for run in seen:
            for name, value in run.metrics.items():
                measured.add_metric([run.run, name], value)
        yield measured
