"""All runs."""

from __future__ import annotations

import time
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import DataTable, Footer, Header, Static

from freestep.api.models import RunStatus
from freestep.client import Client
from freestep.commands.facts import policy_of
from freestep.commands.live_view.looking import LookingScreen, fill, new_table
from freestep.commands.live_view.run_screen import RunScreen
from freestep.commands.rates import Rates
from freestep.commands.shared import or_dash, steps_or_dash

__all__ = ["RunsScreen"]

_COLUMNS = (
    "run", "algorithm", "policy", "epoch", "step", "steps/s", "loss", "staleness", "workers", "applied", "dropped",
    "checkpoint",
)  # fmt: skip


class RunsScreen(LookingScreen[list[RunStatus]]):
    """A row for each run; Enter looks into one."""

    BINDINGS: ClassVar[list[BindingType]] = []

    def __init__(self, client: Client, every_s: float) -> None:
        super().__init__(every_s, self._ask, self._lay_out)
        self._client = client
        self._rates = Rates()

    def compose(self) -> ComposeResult:
        yield Header()
        yield Static(id="problem")
        yield new_table(_COLUMNS, "runs")
        yield Footer()

    def _ask(self) -> list[RunStatus]:
        return self._client.runs()

    def _lay_out(self, found: list[RunStatus]) -> None:
        now = time.monotonic()
        self._rates.keep(each.run for each in found)
        self.sub_title = f"{len(found)} run{'s' * (len(found) != 1)}"
        fill(self.query_one("#runs", DataTable), [self._row(each, now) for each in found])

    def _row(self, status: RunStatus, now: float) -> tuple[object, ...]:
        return (
            status.run,
            status.spec.optimizer.algorithm,
            policy_of(status),
            status.epoch,
            status.step,
            or_dash(self._rates.measure(status.run, status.step, now)),
            or_dash(status.loss),
            steps_or_dash(status.staleness),
            len(status.workers),
            status.pushes.get("applied", 0),
            status.pushes.get("dropped", 0),
            or_dash(status.checkpoint_step),
        )

    def on_data_table_row_selected(self, selected: DataTable.RowSelected) -> None:
        if (run := selected.row_key.value) is not None:
            self.app.push_screen(RunScreen(self._client.run(run), self._every_s))
