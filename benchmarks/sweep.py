"""What a push costs by the size of the model and the number of workers, and the line that this is of one worker.

A cost is the time of a window by the pushes of all workers in it. Windows of the numbers of workers alternate for each
size. The line is fitted so that its relative distance from the costs is least, since sizes span three decades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from benchmarks.crew import Crew
from benchmarks.figures import Figure, Report, spread
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import new_run
from freestep import Client

SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 25_000_000, 50_000_000, 100_000_000)
QUICK_SIZES = (100_000, 1_000_000, 5_000_000)
WORKERS = (1, 2, 4, 8)
WINDOWS, SECONDS = 5, 1.0
QUICK_WINDOWS, QUICK_SECONDS = 3, 0.3

_SERVICE_VECTORS, _WORKER_VECTORS = 10, 2
"""fp32 vectors in memory at most: y, z and v, what is in flight, and one to spare; gradient and y of a worker."""
_COLOURS = ("#1f5fbf", "#d9822b", "#3a9b5c", "#8a4fbf")


@dataclass(frozen=True)
class Point:
    """Milliseconds that a push costs, and half the distance between the quartiles."""

    parameters: int
    workers: int
    cost_ms: float
    spread_ms: float


@dataclass(frozen=True)
class RedisPipeline:
    """The cost of a push as a fixed part and one by size; `farthest` is the largest relative distance of a cost."""

    fixed_ms: float
    ms_per_million: float
    farthest: float

    def at(self, parameters: float) -> float:
        return self.fixed_ms + self.ms_per_million * parameters / 1e6


def measure(parameters: int, windows: int, seconds: float) -> list[Point]:
    """One size, with each number of workers."""
    costs: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    with running_service() as service, Client(service.url) as client:
        run = new_run(client, "sweep", parameters)
        with Crew(service.url, run.name) as crew:
            crew.push(max(WORKERS), 0.0)
            for _ in range(windows):
                for workers, taken in costs.items():
                    taken.append(1e3 / crew.push(workers, seconds).rate)
    return [Point(parameters, workers, median(taken), spread(taken)) for workers, taken in costs.items()]


def fit(points: Sequence[Point]) -> RedisPipeline:
    """The line of one worker's costs."""
    alone = [point for point in points if point.workers == 1]
    sizes = np.array([point.parameters / 1e6 for point in alone])
    costs = np.array([point.cost_ms for point in alone])
    slope, fixed = np.polyfit(sizes, costs, 1, w=1 / costs)
    return RedisPipeline(float(fixed), float(slope), float(np.max(np.abs((fixed + slope * sizes) / costs - 1))))


def draw(points: Sequence[Point], line: RedisPipeline, file: Path) -> None:
    """Writes the plot of cost against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for workers, colour in zip(WORKERS, _COLOURS, strict=True):
        mine = [point for point in points if point.workers == workers]
        axes.errorbar(
            [point.parameters for point in mine],
            [point.cost_ms for point in mine],
            yerr=[point.spread_ms for point in mine],
            label=f"{workers} worker{'s' if workers > 1 else ''}",
            color=colour,
            marker="o",
            linewidth=1.2,
            capsize=3,
        )
    sizes = np.geomspace(min(point.parameters for point in points), max(point.parameters for point in points))
    label = f"{line.fixed_ms:.2f} ms + {line.ms_per_million:.2f} ms per million parameters"
    axes.plot(sizes, [line.at(size) for size in sizes], color="#555555", linestyle="--", linewidth=1, label=label)
    axes.axhline(line.fixed_ms, color="#555555", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e6:g}M"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel("ms per push + pull, of all workers")
    axes.set_title("What a push + pull costs: fp32, AdamW Schedule-Free")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    points, notes = [], []
    for parameters in QUICK_SIZES if options.quick else SIZES:
        needed = 4 * parameters * (_SERVICE_VECTORS + _WORKER_VECTORS * max(WORKERS))
        if needed > psutil.virtual_memory().available:
            notes.append(f"without {parameters / 1e6:g}M: it needs {needed / 1e9:.1f} GB of memory")
            continue
        points += measure(parameters, windows, seconds)
    line = fit(points)
    if options.plot is not None:
        draw(points, line, options.plot)
        notes.append(f"plotted in {options.plot}")
    sizes = sorted({point.parameters for point in points})
    span = f"{sizes[0] / 1e6:g}M to {sizes[-1] / 1e6:g}M"
    figures = [
        Figure(f"push + pull, {span}: fixed cost of the line", line.fixed_ms, 0.0, "ms"),
        Figure(f"push + pull, {span}: and per million parameters", line.ms_per_million, 0.0, "ms"),
        Figure(f"push + pull, {span}: the farthest of the costs from it", 100 * line.farthest, 0.0, "%"),
    ]
    for point in points:
        if point.parameters in (sizes[0], sizes[-1]):
            name = f"{point.parameters / 1e6:g}M, a push of {point.workers} worker{'s' if point.workers > 1 else ''}"
            figures.append(Figure(name, point.cost_ms, point.spread_ms, "ms"))
    return Report(figures, notes, {"line": asdict(line), "points": [asdict(point) for point in points]})
