"""The demo's plot: loss and accuracy over time, of x, of y and of the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from freestep.demo.baselines import Baseline
from freestep.demo.evaluator import Evaluation

__all__ = ["LABELS", "draw"]

_COLOURS = {"x": "#1f5fbf", "y": "#d9822b", "constant": "#2e8b57", "cosine": "#7a4fa3"}
LABELS = {
    "x": "x, the average: the service's model at every moment",
    "y": "y, where its workers take gradients",
    "constant": "one process, constant rate",
    "cosine": "one process, cosine for just this length",
}


def draw(
    history: Sequence[Evaluation], events: Sequence[tuple[float, str]], baselines: Sequence[Baseline], file: Path
) -> None:
    """Writes the plot; `events` are times, in seconds since 1970, and texts.

    A baseline of a step is drawn at the time at which the run was at that step: equal budgets stand above each other.
    """
    began = history[0].time
    times = [each.time - began for each in history]
    figure, (trained, losses, accuracies) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 10), layout="constrained")
    for kind in ("constant", "cosine"):
        found = [each for each in baselines if each.kind == kind and each.step >= history[0].step]
        at = numpy.interp([each.step for each in found], [each.step for each in history], times)
        options = {"color": _COLOURS[kind], "label": LABELS[kind], "linewidth": 1.2, "linestyle": "-."}
        trained.plot(at, [each.training_loss for each in found], **options)
        losses.plot(at, [each.loss for each in found], **options)
        accuracies.plot(at, [100 * each.accuracy for each in found], **options)
    for point in ("y", "x"):
        options = {"color": _COLOURS[point], "label": LABELS[point], "linewidth": 2.2 if point == "x" else 1.2}
        trained.plot(times, [getattr(each, f"{point}_training_loss") for each in history], **options)
        losses.plot(times, [getattr(each, f"{point}_loss") for each in history], **options)
        accuracies.plot(times, [100 * getattr(each, f"{point}_accuracy") for each in history], **options)
    for axes, what in ((trained, "training loss"), (losses, "test loss")):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(what)
    trained.set_title(
        f"Schedule-Free over HTTP: {history[-1].step:,} steps by several workers, until the last evaluation"
    )
    accuracies.set_ylabel("test accuracy, %")
    accuracies.set_xlabel("seconds since the first evaluation")
    accuracies.set_ylim(max(0.0, 100 * min(each.x_accuracy for each in history[1:] or history) - 5), 100)
    for axes in (trained, losses, accuracies):
        axes.grid(alpha=0.3, which="both")
        for when, _ in events:
            axes.axvline(when - began, color="#555555", linestyle="--", linewidth=1)
    for when, what in events:
        trained.annotate(
            what,
            (when - began, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=9,
        )
    accuracies.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
