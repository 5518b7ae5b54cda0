"""The plot: the share of useful pushes, and the wait after a kill, by the mean time between kills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.goodput.accounting import Outcome

__all__ = ["draw"]

_COLOURS = ("#8a4fbf", "#d9822b", "#1f5fbf", "#555555")


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Writes it; its format is the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (shares, waits) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for job, colour in zip(dict.fromkeys(each.job for each in outcomes), _COLOURS, strict=False):
        mine = sorted((each for each in outcomes if each.job == job), key=lambda each: each.mean)
        style = {"color": colour, "label": job, "marker": "o"}
        shares.plot([each.mean for each in mine], [100 * each.share for each in mine], **style)
        waited = [
            (each.mean, [wait for wait in [*each.after_worker, *each.after_service] if wait is not None])
            for each in mine
        ]
        waits.plot([mean for mean, some in waited if some], [median(some) for _, some in waited if some], **style)
    for axes in (shares, waits):
        axes.set_xscale("log")
        axes.set_xticks(
            sorted({each.mean for each in outcomes}), [f"{m:g}" for m in sorted({e.mean for e in outcomes})]
        )
        axes.minorticks_off()
        axes.set_xlabel("mean seconds between kills")
        axes.grid(alpha=0.3)
    shares.set_ylim(0, 102)
    shares.set_ylabel("useful pushes, % of those computed")
    if any(len(line.get_ydata()) for line in waits.get_lines()):
        # An axis without values has no logarithm.
        waits.set_yscale("log")
    waits.set_ylabel("seconds from SIGKILL to an applied push, median")
    shares.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
