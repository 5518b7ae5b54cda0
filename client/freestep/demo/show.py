"""The demo's display while it runs: a live table on a terminal, otherwise a line for each evaluation."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from freestep.demo.evaluator import Evaluation
from freestep.terminal import literal, print_line

__all__ = ["Show"]

_BAR_WIDTH = 50


class Show:
    """A context manager; `update` shows an evaluation, `show_event` an event."""

    def __init__(self, console: Console, url: str, *, plain: bool) -> None:
        self._url = url
        self._best = 0.0
        self._events: list[str] = []
        self._last: tuple[Evaluation, float] | None = None
        self._live = None if plain else Live(console=console, auto_refresh=False)

    def update(self, evaluation: Evaluation, progress: float) -> None:
        """Shows an evaluation, and how far the demo is, from 0 to 1."""
        self._best = max(self._best, evaluation.x_accuracy)
        self._last = evaluation, progress
        if self._live is not None:
            self._live.update(self._render(evaluation, progress), refresh=True)
        else:
            print_line(f"{evaluation}  staleness {_or_dash(evaluation.staleness)}")

    def show_event(self, event: str) -> None:
        """Shows an event."""
        self._events.append(event)
        if self._live is None:
            print_line(f"-- {event}")
        elif self._last is not None:
            self._live.update(self._render(*self._last), refresh=True)

    def _render(self, evaluation: Evaluation, progress: float) -> Group:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        facts.add_row("service", literal(self._url))
        facts.add_row("step", f"{evaluation.step:,}")
        workers = "  ".join(f"{name} ({pushes} pushes)" for name, pushes in evaluation.workers.items())
        facts.add_row("workers", literal(workers))
        facts.add_row("staleness", f"{_or_dash(evaluation.staleness)} steps on average")
        facts.add_row("train loss", _or_dash(evaluation.train_loss))
        facts.add_row("test accuracy", self._accuracies(evaluation))
        facts.add_row("events", literal(", ".join(self._events) or "-"))
        bar = ProgressBar(total=1.0, completed=progress, width=_BAR_WIDTH)
        return Group(Text("Schedule-Free as a service", style="bold"), facts, bar)

    def _accuracies(self, evaluation: Evaluation) -> Text:
        return Text.assemble(
            "x ",
            (f"{evaluation.x_accuracy:.1%}", "bold green"),
            f" (best {self._best:.1%})   y {evaluation.y_accuracy:.1%}",
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
