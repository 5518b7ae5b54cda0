"""One worker of a run: its lease, its last push, and what has become of its pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from textual.app import ComposeResult
from textual.widgets import Footer, Header, RichLog, Static

from freestep.api.events import LeaseEvent, PushEvent, RunEvent
from freestep.api.models import WorkerStatus
from freestep.commands.events import told
from freestep.commands.live_view.looking import LookingScreen
from freestep.commands.shared import or_dash
from freestep.terminal import literal, printable

__all__ = ["WorkerScreen"]


class WorkerScreen(LookingScreen[WorkerStatus | None]):
    """What the screen of its run has found of a worker; that screen goes on looking.

    find: the worker as it was found last, None where it holds no lease. events: the newest of the run.
    """

    def __init__(
        self, worker: str, find: Callable[[], WorkerStatus | None], events: Iterable[RunEvent], every_s: float
    ) -> None:
        super().__init__(every_s, find, self._lay_out)
        self._worker = worker
        self._events = events
        self._last: str | None = None
        """The newest event that is shown."""

    def compose(self) -> ComposeResult:
        yield Header()
        yield Static(id="problem")
        yield Static(id="worker-facts", classes="facts")
        yield RichLog(id="worker-events", markup=False, highlight=False)
        yield Footer()

    def _lay_out(self, found: WorkerStatus | None) -> None:
        self.sub_title = f"worker {printable(self._worker)}"
        self.query_one("#worker-facts", Static).update(literal(_facts(found)))
        log = self.query_one("#worker-events", RichLog)
        events = list(self._events)
        known = next((number for number, event in enumerate(events) if event.id == self._last), -1)
        for event in events[known + 1 :]:
            self._last = event.id
            if isinstance(event, PushEvent | LeaseEvent) and event.worker == self._worker:
                log.write(literal(f"{event.step:>8} {event.kind:<10} {told(event)}"))


def _facts(worker: WorkerStatus | None) -> str:
    if worker is None:
        return "it holds no lease: it has ended, or has not been heard of for as long as its lease lasts"
    facts = (
        f"lease ends in {worker.expires_in_ms / 1000:.1f} s of {worker.ttl_ms / 1000:.1f} s",
        f"{worker.pushes} pushes under it, of {worker.received_bytes:,} bytes",
        f"{worker.gathered} of them in the update that is being gathered",
        f"last push taken at step {or_dash(worker.step)}, staleness {or_dash(worker.staleness)}",
        f"{or_dash(worker.speed)} steps/s",
        f"{worker.outliers} outliers",
    )
    return " | ".join(facts)
