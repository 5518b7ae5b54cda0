"""One run: where it stands, its loss and speed over its whole life, its workers, and what happens."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Header, RichLog, Sparkline, Static

from freestep.api.events import RunEvent
from freestep.api.history import Curve, History
from freestep.api.models import RunStatus, WorkerStatus
from freestep.commands.events import told
from freestep.commands.facts import policy_of
from freestep.commands.live_view.looking import LookingScreen, fill, new_table
from freestep.commands.live_view.worker_screen import WorkerScreen
from freestep.commands.shared import or_dash, steps_or_dash
from freestep.commands.workers import COLUMNS, Speeds, rows
from freestep.errors import FreestepError
from freestep.run import Run
from freestep.terminal import literal, printable

__all__ = ["RunScreen"]

_KEPT = 500
"""Events that are shown, and kept for looking into workers."""
_POINTS = 64
"""Of a curve: about as many as there are columns for it."""


@dataclass(frozen=True)
class RunLook:
    """What a look at a run has found. problem: why there are no curves or no events."""

    status: RunStatus
    history: History | None
    events: Sequence[RunEvent]
    problem: str


class RunScreen(LookingScreen[RunLook]):
    """Enter looks into a worker."""

    DEFAULT_CSS = """
    RunScreen .curve { height: 5; width: 1fr; padding: 0 1; }
    RunScreen .curves { height: 5; }
    RunScreen Sparkline { height: 3; }
    RunScreen RichLog { height: 1fr; border-top: solid $primary; }
    """

    def __init__(self, run: Run, every_s: float) -> None:
        super().__init__(every_s, self._ask, self._lay_out)
        self._run = run
        self._speeds = Speeds()
        self._after: str | None = None
        """The last event that was read."""
        self._events: deque[RunEvent] = deque(maxlen=_KEPT)
        self._workers: dict[str, WorkerStatus] = {}

    def compose(self) -> ComposeResult:
        yield Header()
        yield Static(id="problem")
        yield Static(id="facts", classes="facts")
        with Horizontal(classes="curves"):
            for name in ("loss", "steps_per_second"):
                with Vertical(classes="curve"):
                    yield Static(id=f"{name}-ends")
                    yield Sparkline([], id=name)
        yield new_table(COLUMNS, "workers")
        yield RichLog(id="events", max_lines=_KEPT, markup=False, highlight=False)
        yield Footer()

    def _ask(self) -> RunLook:
        status, history, events, problem = self._run.status(), None, [], ""
        try:
            history = self._run.history(["loss", "steps_per_second"], points=_POINTS)
            for event in self._run.events(self._after, follow=False):
                self._after = event.id
                events.append(event)
        except FreestepError as error:
            # The status tells of a run that is closed, too.
            problem = str(error)
        return RunLook(status, history, events, problem)

    def _lay_out(self, found: RunLook) -> None:
        status = found.status
        self.sub_title = f"run {printable(status.run)}"
        self.query_one("#facts", Static).update(literal(_facts(status, found.problem)))
        workers = self._speeds.complete(status.workers, time.monotonic())
        self._workers = {each.worker: each for each in workers}
        fill(self.query_one("#workers", DataTable), rows(workers))
        if found.history is not None:
            for name, curve in found.history.curves.items():
                self.query_one(f"#{name}", Sparkline).data = _heights(name, curve)
                self.query_one(f"#{name}-ends", Static).update(literal(_ends(name, curve)))
        log = self.query_one("#events", RichLog)
        for event in found.events[-_KEPT:]:
            self._events.append(event)
            log.write(literal(f"{event.step:>8} {event.kind:<10} {told(event)}"))

    def on_data_table_row_selected(self, selected: DataTable.RowSelected) -> None:
        if (worker := selected.row_key.value) is not None:
            self.app.push_screen(WorkerScreen(worker, lambda: self._workers.get(worker), self._events, self._every_s))


def _facts(status: RunStatus, problem: str) -> str:
    pushes = ", ".join(f"{count} {decision}" for decision, count in status.pushes.items())
    facts = (
        f"{status.spec.optimizer.algorithm}, {policy_of(status)}",
        f"epoch {status.epoch}, step {status.step}",
        f"{status.shards} shard{'s' if status.shards > 1 else ''}",
        f"checkpoint {or_dash(status.checkpoint_step)}",
        f"pushes: {pushes}",
        f"loss {or_dash(status.loss)}, staleness {steps_or_dash(status.staleness)}",
        *(f"{name} {metric.value:.4g} at step {metric.step}" for name, metric in status.metrics.items()),
        *([problem] if problem else []),
    )
    return " | ".join(facts)


def _is_log(name: str, curve: Curve) -> bool:
    return name == "loss" and min(curve.mean, default=0.0) > 0


def _heights(name: str, curve: Curve) -> list[float]:
    """A curve as it is drawn: a loss by its logarithm, since else nothing is seen of it after the first steps."""
    return [math.log(value) for value in curve.mean] if _is_log(name, curve) else list(curve.mean)


def _ends(name: str, curve: Curve) -> str:
    """What a curve is of, and where it stands."""
    if not curve.step:
        return f"{name}: nothing yet"
    scale = " (log)" * _is_log(name, curve)
    least, largest = min(curve.min), max(curve.max)
    return f"{name}{scale}: {curve.mean[-1]:.4g} now, {least:.4g} to {largest:.4g}, to step {curve.step[-1]}"
