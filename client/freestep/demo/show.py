"""What the demo shows while it runs: a live table on a terminal, else a line for each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from freestep.demo.evaluator import Evaluation

__all__ = ["Show"]

_BAR_WIDTH = 50


class Show:
    """A context manager; `update` is told of each evaluation."""

    def __init__(self, console: Console, url: str, steps: int, *, plain: bool) -> None:
        self._console = console
        self._url = url
        self._steps = steps
        self._best = 0.0
        self._said = 0
        self._live = None if plain else Live(console=console, auto_refresh=False)

    def update(self, evaluation: Evaluation, events: Sequence[str]) -> None:
        """Shows an evaluation, and what has happened so far."""
        self._best = max(self._best, evaluation.x_accuracy)
        if self._live is not None:
            self._live.update(self._render(evaluation, events), refresh=True)
            return
        for event in events[self._said :]:
            self._console.print(f"-- {event}", highlight=False)
        self._said = len(events)
        self._console.print(
            f"{evaluation}  staleness {_or_dash(evaluation.staleness)}", soft_wrap=True, highlight=False
        )

    def _render(self, evaluation: Evaluation, events: Sequence[str]) -> Group:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        facts.add_row("service", self._url)
        facts.add_row("step", f"{evaluation.step:,} of {self._steps:,}")
        facts.add_row("workers", "  ".join(f"{name} ({pushes} pushes)" for name, pushes in evaluation.workers.items()))
        facts.add_row("staleness", f"{_or_dash(evaluation.staleness)} steps on average")
        facts.add_row("train loss", _or_dash(evaluation.train_loss))
        facts.add_row("test accuracy", self._accuracies(evaluation))
        facts.add_row("events", ", ".join(events) or "-")
        bar = ProgressBar(total=self._steps, completed=min(evaluation.step, self._steps), width=_BAR_WIDTH)
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
        else:
            self._console.print(f"the service is at {self._url}", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
