"""The metrics at /metrics, for Prometheus, and the moving averages of a run's status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest

from freestep_service.domain.data_progress import UnitCounts
from freestep_service.domain.records import Record
from freestep_service.domain.run_view import RunView
from freestep_service.domain.tally import DECISIONS, NOTHING_COUNTED, Tally
from freestep_service.runs.histograms import SECONDS, Histogram
from freestep_service.runs.phases import PHASES, Phases
from freestep_service.runs.run_gauges import RunGauges

__all__ = ["Metrics", "RunMetrics"]

_SMOOTHING = 0.1
"""Weight of the newest push in the moving averages."""
_REASONS = ("stale", "duplicate-worker", "norms-unknown")
"""Why pushes are dropped; the label of any other is `other`."""
_CHANGES = ("granted", "released", "ended", "expired")
"""What happens to leases."""


class Metrics:
    """The metrics of one service; each app has a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.runs = RunGauges(registry)
        Gauge("freestep_info", "Always 1.", ["version"], registry=registry).labels(version("freestep")).set(1)
        self._exposing: asyncio.Future[bytes] | None = None
        self.problems = Counter("freestep_problems", "Refused requests.", ["slug"], registry=registry)
        self.pushes = Counter("freestep_pushes", "Pushes decided.", ["run", "decision"], registry=registry)
        self.replays = Counter("freestep_replays", "Pushes answered from their receipt.", ["run"], registry=registry)
        self.staleness = Histogram(
            "freestep_staleness_steps",
            "Staleness of the pushes that were not dropped.",
            ["run"],
            (0, 1, 2, 4, 8, 16, 32, 64, 128),
            registry,
        )
        self.push_seconds = Histogram(
            "freestep_push_seconds",
            "Time from a push's claim to its being applied.",
            ["run"],
            SECONDS,
            registry,
        )
        self.phase_seconds = Histogram(
            "freestep_push_phase_seconds",
            "Time of each phase of a shard's part of a push.",
            ["run", "phase"],
            SECONDS,
            registry,
        )
        self.dropped = Counter(
            "freestep_dropped_pushes", "Pushes that were dropped, by why.", ["run", "reason"], registry=registry
        )
        self.leases = Counter(
            "freestep_leases",
            "Leases granted, released, ended by an operator and expired.",
            ["run", "change"],
            registry=registry,
        )
        self.flush_seconds = Histogram(
            "freestep_journal_flush_seconds",
            "Time that the disk took to make a piece of a journal durable.",
            ["run"],
            SECONDS,
            registry,
        )
        self.redis_seconds = Histogram(
            "freestep_redis_seconds", "Time until Redis has answered a script.", ["script"], SECONDS, registry
        )
        self.redis_failures = Counter(
            "freestep_redis_failures", "Calls of scripts that Redis has not answered, or refused.", registry=registry
        )
        self.received = Counter("freestep_received_bytes", "Bytes of gradients.", ["run"], registry=registry)
        self.sent = Counter("freestep_sent_bytes", "Bytes of parameters.", ["run"], registry=registry)
        self.shared = Gauge(
            "freestep_shared_memory_bytes", "Memory that workers on this machine have mapped too.", registry=registry
        )
        self.workers = Gauge("freestep_workers", "Live workers.", ["run"], registry=registry)
        self.units = Gauge(
            "freestep_units",
            "Units of data sets over all passes, by state: open, out with workers, done.",
            ["run", "name", "state"],
            registry=registry,
        )
        self.checkpoint_failures = Counter(
            "freestep_checkpoint_failures", "Checkpoints that could not be written.", ["run"], registry=registry
        )
        self.checkpoint_seconds = Histogram(
            "freestep_checkpoint_seconds", "Time to write a checkpoint.", ["run"], SECONDS, registry
        )

    async def expose(self) -> bytes:
        """All of them, in Prometheus's text format; written in a thread, and once for all who ask meanwhile."""
        if self._exposing is None or self._exposing.done():
            self.runs.look()
            self._exposing = asyncio.ensure_future(asyncio.to_thread(self.text))
        return await asyncio.shield(self._exposing)

    def text(self) -> bytes:
        """All of them, as runs stood when they were looked at last."""
        return generate_latest(self._registry)

    def redis_answered(self, script: str, seconds: float) -> None:
        """Redis has answered a script."""
        self.redis_seconds.labels(script).observe(seconds)

    def forget(self, run: str) -> None:
        """Removes every series of a run."""
        for counter, values in (
            (self.pushes, DECISIONS),
            (self.dropped, (*_REASONS, "other")),
            (self.leases, _CHANGES),
        ):
            for value in values:
                with suppress(KeyError):
                    counter.remove(run, value)
        for histogram in (
            self.staleness,
            self.push_seconds,
            self.phase_seconds,
            self.flush_seconds,
            self.checkpoint_seconds,
        ):
            histogram.remove(run)
        for metric in (
            self.replays,
            self.received,
            self.sent,
            self.workers,
            self.checkpoint_failures,
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
        self._counted: set[tuple[str, str]] = set()
        """The data sets and states whose units are shown."""
        # Found once: a push has to do with most of them.
        self._received, self._sent = metrics.received.labels(run), metrics.sent.labels(run)
        self._pushes = {decision: metrics.pushes.labels(run, decision) for decision in DECISIONS}
        self._push_seconds, self._staleness = metrics.push_seconds.labels(run), metrics.staleness.labels(run)
        self._phases = {phase: metrics.phase_seconds.labels(run, phase) for phase in PHASES}
        self._dropped = {reason: metrics.dropped.labels(run, reason) for reason in (*_REASONS, "other")}
        # Made before they count, since Prometheus sees no rise in a series that begins at 1.
        self._replays, self._failures = metrics.replays.labels(run), metrics.checkpoint_failures.labels(run)
        self._leases = {change: metrics.leases.labels(run, change) for change in _CHANGES}

    def received(self, size: int) -> None:
        self._received.inc(size)

    def pushed(self, record: Record, loss: float | None, seconds: float) -> None:
        self._pushes[record.decision].inc()
        self._push_seconds.observe(seconds)
        if record.decision == "dropped":
            self._dropped[record.reason if record.reason in _REASONS else "other"].inc()
        else:
            self._staleness.observe(record.staleness)
            self.staleness = _smooth(self.staleness, record.staleness)
            if loss is not None:
                self.loss = _smooth(self.loss, loss)

    def passed(self, phases: Phases) -> None:
        """A shard's part of a push has come to the end of its way."""
        for phase, seconds in phases.seconds().items():
            self._phases[phase].observe(seconds)

    def answered(self, seconds: float) -> None:
        """The answer to a push was sent, with y."""
        self._phases["answer"].observe(seconds)

    def leased(self, change: str) -> None:
        """A lease was granted, released, ended by an operator, or has expired."""
        self._leases[change].inc()

    def flushed(self, seconds: float) -> None:
        """A piece of a journal was made durable."""
        if not self._forgotten:
            self._metrics.flush_seconds.labels(self._run).observe(seconds)

    def note(self, view: RunView) -> None:
        """Notes what Redis has counted, unless it has lost that."""
        if "applied" in view.run:
            self.tally = Tally.of(view)

    def resumed(self, tally: Tally) -> None:
        """The run goes on with the averages of a checkpoint."""
        self.loss, self.staleness = tally.loss, tally.staleness

    def replayed(self) -> None:
        self._replays.inc()

    def sent(self, size: int) -> None:
        self._sent.inc(size)

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

    def live(self, workers: int | None) -> None:
        """Shows so many live workers, or with None no number of them."""
        if workers is None:
            with suppress(KeyError):
                self._metrics.workers.remove(self._run)
        elif not self._forgotten:
            self._metrics.workers.labels(self._run).set(workers)

    def forget(self) -> None:
        """Ends the run's series, so that a deleted run is no longer exposed."""
        self._forgotten = True
        self.counted([])
        self._metrics.forget(self._run)

    def checkpoint_failed(self) -> None:
        self._failures.inc()

    def checkpointed(self, seconds: float) -> None:
        self._metrics.checkpoint_seconds.labels(self._run).observe(seconds)


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else (1 - _SMOOTHING) * average + _SMOOTHING * value
