"""The metrics at /metrics, for Prometheus, and the moving averages of a run's status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from freestep_service.domain.data_progress import UnitCounts
from freestep_service.domain.records import Record
from freestep_service.domain.reports import Reported
from freestep_service.domain.run_view import RunView
from freestep_service.domain.tally import DECISIONS, NOTHING_COUNTED, Tally

__all__ = ["Metrics", "RunMetrics"]

_SMOOTHING = 0.1
"""Weight of the newest push in the moving averages."""


class Metrics:
    """The metrics of one service; each app has a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._exposing: asyncio.Future[bytes] | None = None
        self.problems = Counter("freestep_problems", "Refused requests.", ["slug"], registry=registry)
        self.pushes = Counter("freestep_pushes", "Pushes decided.", ["run", "decision"], registry=registry)
        self.replays = Counter("freestep_replays", "Pushes answered from their receipt.", ["run"], registry=registry)
        self.staleness = Histogram(
            "freestep_staleness_steps",
            "Staleness of the pushes that were not dropped.",
            ["run"],
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.push_seconds = Histogram(
            "freestep_push_seconds",
            "Time from a push's claim to its being applied.",
            ["run"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=registry,
        )
        self.received = Counter("freestep_received_bytes", "Bytes of gradients.", ["run"], registry=registry)
        self.sent = Counter("freestep_sent_bytes", "Bytes of parameters.", ["run"], registry=registry)
        self.step = Gauge("freestep_step", "The newest step.", ["run"], registry=registry)
        self.epoch = Gauge("freestep_epoch", "The epoch.", ["run"], registry=registry)
        self.workers = Gauge("freestep_workers", "Live workers.", ["run"], registry=registry)
        self.loss = Gauge("freestep_loss", "Moving average of reported losses.", ["run"], registry=registry)
        self.measured = Gauge("freestep_metric", "Metrics that evaluators report.", ["run", "name"], registry=registry)
        self.units = Gauge(
            "freestep_units",
            "Units of data sets over all passes, by state: open, out with workers, done.",
            ["run", "name", "state"],
            registry=registry,
        )
        self.checkpoint_step = Gauge(
            "freestep_checkpoint_step", "Step of the newest checkpoint.", ["run"], registry=registry
        )
        self.checkpoint_failures = Counter(
            "freestep_checkpoint_failures", "Checkpoints that could not be written.", ["run"], registry=registry
        )
        self.checkpoint_seconds = Histogram(
            "freestep_checkpoint_seconds", "Time to write a checkpoint.", ["run"], registry=registry
        )

    async def expose(self) -> bytes:
        """All of them, in Prometheus's text format; written in a thread, and once for all who ask meanwhile."""
        if self._exposing is None or self._exposing.done():
            self._exposing = asyncio.ensure_future(asyncio.to_thread(generate_latest, self._registry))
        return await asyncio.shield(self._exposing)

    def forget(self, run: str) -> None:
        """Removes every series of a run."""
        for decision in DECISIONS:
            with suppress(KeyError):
                self.pushes.remove(run, decision)
        for metric in (
            self.replays,
            self.staleness,
            self.push_seconds,
            self.received,
            self.sent,
            self.step,
            self.epoch,
            self.workers,
            self.loss,
            self.checkpoint_step,
            self.checkpoint_failures,
            self.checkpoint_seconds,
        ):
            with suppress(KeyError):
                metric.remove(run)


class RunMetrics:
    """The metrics of one run. `loss` and `staleness` are moving averages, None before the first value."""

    def __init__(self, metrics: Metrics, run: str) -> None:
        self.loss: float | None = None
        self.staleness: float | None = None
        self.tally = NOTHING_COUNTED
        """What Redis counted last, in all processes."""
        self._metrics = metrics
        self._run = run
        self._forgotten = False
        self._names: set[str] = set()
        self._counted: set[tuple[str, str]] = set()
        """The data sets and states whose units are shown."""
        # Found once: a push has to do with most of them.
        self._epoch, self._step = metrics.epoch.labels(run), metrics.step.labels(run)
        self._received, self._sent = metrics.received.labels(run), metrics.sent.labels(run)
        self._pushes = {decision: metrics.pushes.labels(run, decision) for decision in DECISIONS}
        self._push_seconds, self._staleness = metrics.push_seconds.labels(run), metrics.staleness.labels(run)

    def at(self, epoch: int, step: int) -> None:
        self._epoch.set(epoch)
        self._step.set(step)

    def received(self, size: int) -> None:
        self._received.inc(size)

    def pushed(self, record: Record, loss: float | None, seconds: float) -> None:
        self._pushes[record.decision].inc()
        self._push_seconds.observe(seconds)
        if record.decision != "dropped":
            self._staleness.observe(record.staleness)
            self.staleness = _smooth(self.staleness, record.staleness)
            if loss is not None:
                self.loss = _smooth(self.loss, loss)
                self._metrics.loss.labels(self._run).set(self.loss)

    def note(self, view: RunView) -> None:
        """Notes what Redis has counted, unless it has lost that."""
        if "applied" in view.run:
            self.tally = Tally.of(view)

    def resumed(self, tally: Tally) -> None:
        """The run goes on with the averages of a checkpoint."""
        self.loss, self.staleness = tally.loss, tally.staleness
        if self.loss is not None:
            self._metrics.loss.labels(self._run).set(self.loss)

    def replayed(self) -> None:
        self._metrics.replays.labels(self._run).inc()

    def sent(self, size: int) -> None:
        self._sent.inc(size)

    def measured(self, name: str, value: float) -> None:
        self._names.add(name)
        self._metrics.measured.labels(self._run, name).set(value)

    def restored(self, reported: Reported) -> None:
        """The run goes on with what had been reported at some place in its log."""
        for name in self._names:
            self._metrics.measured.remove(self._run, name)
        self._names.clear()
        for name, steps in reported.items():
            self.measured(name, steps[max(steps)])

    def counted(self, sets: Iterable[UnitCounts]) -> None:
        """Shows these data sets and no others."""
        found = {
            (each.name, state): count
            for each in sets
            for state, count in (("open", each.open), ("out", each.out), ("done", each.done))
            if count is not None and not self._forgotten
        }
        for name, state in self._counted - found.keys():
            self._metrics.units.remove(self._run, name, state)
        for (name, state), count in found.items():
            self._metrics.units.labels(self._run, name, state).set(count)
        self._counted = set(found)

    def live(self, workers: int) -> None:
        if self._forgotten:
            return
        self._metrics.workers.labels(self._run).set(workers)

    def forget(self) -> None:
        """Ends the run's series, so that a deleted run is no longer exposed."""
        self._forgotten = True
        self.restored({})
        self.counted([])
        self._metrics.forget(self._run)

    def checkpoint_failed(self) -> None:
        self._metrics.checkpoint_failures.labels(self._run).inc()

    def checkpointed(self, step: int, seconds: float) -> None:
        self._metrics.checkpoint_step.labels(self._run).set(step)
        self._metrics.checkpoint_seconds.labels(self._run).observe(seconds)


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else (1 - _SMOOTHING) * average + _SMOOTHING * value
