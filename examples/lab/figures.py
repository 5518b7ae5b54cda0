"""How the lab shows what it found: tables in Markdown, and plots of one style."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

__all__ = ["COLOURS", "Table", "digits", "markdown", "percent", "plot", "plus_minus"]

COLOURS = ("#1f5fbf", "#d9822b", "#3a9b5c", "#8a4fbf", "#b8342f", "#555555", "#1795a3", "#a8831a")
"""Of the things compared, in their order; the first is Schedule-Free."""


@dataclass(frozen=True)
class Table:
    """Rows under their heads; the first column is text, the others are figures."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.heads, ["---", *["---:"] * (len(self.heads) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def markdown(tables: Iterable[Table]) -> str:
    return "\n\n".join(table.markdown() for table in tables) + "\n"


def digits(value: float, count: int = 3) -> str:
    """So many digits that count, and no exponent."""
    if not isfinite(value):
        return "diverged"
    if value == 0:
        return "0"
    return f"{value:,.{max(0, count - 1 - floor(log10(abs(value))))}f}"


def plus_minus(average: float, spread: float) -> str:
    """A mean, to three digits or, where the spread is as small, to four, and its spread."""
    if not isfinite(average):
        return "diverged"
    first = floor(log10(abs(average))) if average else 0
    decimals = max(0, (2 if spread > 10 ** (first - 2) else 3) - first)
    return f"{average:,.{decimals}f} ± {spread:.{decimals}f}"


def percent(average: float, spread: float) -> str:
    """A share and its spread."""
    return f"{100 * average:.1f}% ± {100 * spread:.1f}"


@contextmanager
def plot(file: Path, title: str, across: str, up: str, **options: Any) -> Iterator[Any]:
    """Axes to draw on, which are written to the file in the end. options: of `pyplot.subplots`."""
    figure, axes = pyplot.subplots(figsize=options.pop("figsize", (7.5, 4.8)), layout="constrained", **options)
    figure.suptitle(title)
    drawn = BytesIO()
    panels = list(axes.flat) if hasattr(axes, "flat") else [axes]
    try:
        yield axes
        for panel in panels:
            panel.set_xlabel(panel.get_xlabel() or across)
            panel.set_ylabel(panel.get_ylabel() or up)
            panel.grid(alpha=0.3)
        figure.savefig(drawn, dpi=100)
        # A palette makes the file a third as large.
        Image.open(drawn).convert("RGB").quantize(128).save(file, optimize=True)
    finally:
        pyplot.close(figure)
