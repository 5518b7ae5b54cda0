"""The pictures of the concepts, computed and drawn: `make pictures`.

Schedule-Free SGD is run here as its equations stand in docs/concepts/points.md, on two small problems: a valley of two
dimensions, where the points can be seen, and a quadratic of fifty, where their losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
from matplotlib import pyplot
from numpy.typing import NDArray

from documents.reference import ROOT

__all__ = ["FOLDER", "NAMES", "draw"]

Array = NDArray[numpy.float64]
Points = list[tuple[Array, Array, Array]]

FOLDER = ROOT / "docs" / "concepts"
NAMES = ("points.svg", "anytime.svg", "staleness.svg")

_BETA = 0.9
_COLOURS = {"x": "#1f5fbf", "y": "#d9822b", "z": "#8a8a8a", "cosine": "#7a4fa3", "constant": "#2e8b57"}
_STEPS = 3000
_COSINES = (300, 1000, 3000)
_SEEDS = 10
_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)


def draw() -> list[str]:
    """Draws all; returns their paths in docs/."""
    pyplot.rcParams.update({"svg.hashsalt": "freestep", "svg.fonttype": "none", "font.size": 10})
    for name, make in zip(NAMES, (_points, _anytime, _staleness), strict=True):
        figure = make()
        figure.savefig(FOLDER / name, metadata={"Date": None})
        pyplot.close(figure)
    return [f"concepts/{name}" for name in NAMES]


def _schedule_free(start: Array, lr: float, steps: int, gradient: Callable[[Array], Array]) -> Points:
    """x, y and z after each step."""
    x, z = start.copy(), start.copy()
    found = [(x, x, z)]
    for k in range(steps):
        y = (1 - _BETA) * z + _BETA * x
        z = z - lr * gradient(y)
        x = x + (z - x) / (k + 1)
        found.append((x, (1 - _BETA) * z + _BETA * x, z))
    return found


def _points() -> Any:
    random = numpy.random.default_rng(1)
    curvature, start = numpy.array([0.1, 1.0]), numpy.array([-3.4, 1.6])
    trail = _schedule_free(start, 1.2, 60, lambda y: curvature * y + 0.3 * random.standard_normal(2))
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    across, up = numpy.meshgrid(numpy.linspace(-4.5, 2.5, 200), numpy.linspace(-2, 2.2, 200))
    axes.contour(across, up, 0.5 * (curvature[0] * across**2 + curvature[1] * up**2), levels=12, colors="#dddddd")
    labels = {"z": "z, the base iterate: takes the steps", "y": "y, where gradients are taken", "x": "x, the average"}
    for index, name in ((2, "z"), (1, "y"), (0, "x")):
        line = numpy.array([each[index] for each in trail])
        width = 2.2 if name == "x" else 1.0
        axes.plot(
            line[:, 0], line[:, 1], "o-", color=_COLOURS[name], linewidth=width, markersize=2.5, label=labels[name]
        )
    axes.plot(0, 0, "k*", markersize=11, label="the minimum")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="lower right", framealpha=0.9)
    return figure


def _anytime() -> Any:
    """The mean over seeds, for each method with the rate of a grid that is the best in the end."""
    curvature = numpy.logspace(-2, 0, 50)
    start = 1 / numpy.sqrt(curvature)

    def loss(point: Array) -> float:
        return float(0.5 * numpy.sum(curvature * point**2))

    def noisy(seed: int) -> Callable[[Array], Array]:
        random = numpy.random.default_rng(seed)
        return lambda point: curvature * point + 0.5 * numpy.sqrt(curvature) * random.standard_normal(len(point))

    def averaged(lr: float) -> list[float]:
        found = [[loss(x) for x, _, _ in _schedule_free(start, lr, _STEPS, noisy(seed))] for seed in range(_SEEDS)]
        return list(numpy.mean(found, axis=0))

    def scheduled(lr: float, steps: int, factor: Callable[[float], float]) -> list[float]:
        found = []
        for seed in range(_SEEDS):
            gradient, point, losses = noisy(seed), start.copy(), [loss(start)]
            for k in range(steps):
                point = point - lr * factor(k / steps) * gradient(point)
                losses.append(loss(point))
            found.append(losses)
        return list(numpy.mean(found, axis=0))

    def best(run: Callable[[float], list[float]]) -> list[float]:
        """The run with the lowest loss in the end, of those that stay near where they began."""
        runs = [run(lr) for lr in _RATES]
        return min((each for each in runs if max(each) < 10 * each[0]), key=lambda each: each[-1])

    def plot(losses: list[float], name: str, **options: Any) -> None:
        shown = sorted({*numpy.unique(numpy.geomspace(10, len(losses) - 1, 150).astype(int)), len(losses) - 1})
        axes.plot(shown, [losses[each] for each in shown], color=_COLOURS[name], **options)

    def half_cosine(share: float) -> float:
        return 0.5 * (1 + float(numpy.cos(numpy.pi * share)))

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    with numpy.errstate(over="ignore", invalid="ignore"):
        flat = best(lambda lr: scheduled(lr, _STEPS, lambda _: 1.0))
        plot(flat, "constant", linewidth=1, label="constant rate")
        for steps in _COSINES:
            losses = best(partial(scheduled, steps=steps, factor=half_cosine))
            label = "cosine, a run for each length" if steps == _COSINES[0] else None
            plot(losses, "cosine", linewidth=1, label=label)
            axes.plot(steps, losses[-1], "o", color=_COLOURS["cosine"], markersize=5)
        plot(best(averaged), "x", linewidth=2.2, label="x of one Schedule-Free run")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _staleness() -> Any:
    figure, axes = pyplot.subplots(figsize=(8, 3.0), layout="constrained")
    # For each worker, its gradients: the step of the y that it has, when it begins, and when its push is applied.
    fast = [(0, 0.0, 1.0), (1, 1.0, 2.0), (2, 2.0, 3.0), (3, 3.0, 4.9)]
    slow = [(0, 0.0, 3.9)]
    applied = sorted([end for _, _, end in fast + slow])
    rows = (("a slow worker", slow, "#fbe3cb"), ("a fast worker", fast, "#d9e6f7"))
    for row, (name, gradients, colour) in enumerate(rows):
        axes.text(-0.1, row, name, ha="right", va="center")
        for step, begin, end in gradients:
            at = applied.index(end) + 1
            axes.barh(row, end - begin - 0.06, left=begin, height=0.5, color=colour, edgecolor="#888888")
            axes.text((begin + end) / 2, row, f"at y of step {step}", ha="center", va="center", fontsize=8.5)
            axes.annotate("", (end, 1.85), (end, row + 0.27), arrowprops={"arrowstyle": "->", "color": "#555555"})
            axes.text(end, 2.0, f"step {at}\nstaleness {at - 1 - step}", ha="center", va="bottom", fontsize=8.5)
    axes.text(-0.1, 2.2, "the run", ha="right", va="center")
    axes.axhline(1.87, color="#555555", linewidth=1)
    axes.set_xlim(-1.1, 5.4)
    axes.set_ylim(-0.5, 2.8)
    axes.axis("off")
    return figure
