"""What a benchmark reports: figures beside their targets, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "Report", "print_table", "spread"]

_WIDTH = 130
"""Columns that the table takes at least, also where the output is not a terminal's."""


@dataclass(frozen=True)
class Figure:
    """The median of several runs, half the distance between their quartiles, and what is to be reached, if anything."""

    measure: str
    value: float
    spread: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    @classmethod
    def of(
        cls,
        measure: str,
        runs: Iterable[float],
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
    ) -> Self:
        taken = list(runs)
        return cls(measure, median(taken), spread(taken), unit, most, least)

    @property
    def target(self) -> str:
        if self.most is not None:
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if self.least is not None else ""

    @property
    def verdict(self) -> str:
        if self.most is not None:
            return "ok" if self.value <= self.most else "over"
        if self.least is not None:
            return "ok" if self.value >= self.least else "under"
        return ""


@dataclass
class Report:
    """A benchmark's figures, what there is to say of them, and what they were made of, for programs."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: Any = None


def spread(runs: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(runs) < 2:
        return 0.0
    low, _, high = quantiles(runs, n=4, method="inclusive")
    return (high - low) / 2


def print_table(reports: dict[str, Report]) -> None:
    """One table of all figures, by benchmark, and the notes under it."""
    table = Table(
        title="freestep: medians ± half the distance between the quartiles",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("benchmark", no_wrap=True)
    table.add_column("measure", no_wrap=True)
    for name in ("figure", "±", "unit", "target", ""):
        table.add_column(name, justify="left" if name in ("unit", "") else "right", no_wrap=True)
    for benchmark, report in reports.items():
        for number, figure in enumerate(report.figures):
            table.add_row(
                "" if number else benchmark,
                figure.measure,
                _digits(figure.value),
                _digits(figure.spread),
                figure.unit,
                figure.target,
                figure.verdict,
                end_section=number == len(report.figures) - 1,
            )
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table)
    for benchmark, report in reports.items():
        for note in report.notes:
            console.print(f"{benchmark}: {note}", highlight=False, soft_wrap=True)


def _digits(figure: float) -> str:
    """Three digits that count, and no exponent."""
    for digits, bound in ((0, 100), (1, 10)):
        if abs(figure) >= bound:
            return f"{figure:,.{digits}f}"
    return f"{figure:.2f}"
