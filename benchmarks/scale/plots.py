"""The plots of docs/scale.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.measured import SHARDS, SIZES
from examples.lab.figures import COLOURS, plot

__all__ = ["draw"]

Rows = Sequence[Mapping[str, Any]]


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Writes all of them to the folder."""
    _measured(found["compared"], folder / "measured.png")
    simulated = found["simulated"]
    _growth(simulated["growth"], folder / "workers.png")
    _shards(simulated["shards"], folder / "shards.png")
    _links(simulated["links"], folder / "links.png")
    _failures(simulated["failures"], folder / "failures.png")
    _scaling(simulated["scaling"], folder / "scaling.png")


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:g}B" if parameters >= 1e9 else f"{parameters / 1e6:g}M"


def _measured(compared: Rows, file: Path) -> None:
    """What was measured for the costs alone is left out."""
    shards = [each for each in SHARDS if any(row["shards"] == each for row in compared)]
    sizes = [each for each in SIZES if any(row["parameters"] == each for row in compared)]
    with plot(
        file,
        "Pushes a second on the measuring machine: ○ measured, lines simulated",
        "workers",
        "pushes a second",
        figsize=(11, 4),
        ncols=len(shards),
        sharey=True,
        squeeze=False,
    ) as panels:
        for axes, count in zip(panels.flat, shards, strict=True):
            for size, colour in zip(sizes, COLOURS, strict=False):
                rows = [row for row in compared if (row["shards"], row["parameters"]) == (count, size)]
                workers = [row["workers"] for row in rows]
                axes.plot(workers, [row["simulated"] for row in rows], color=colour, label=_millions(size))
                for row in rows:
                    fill = "none" if row["is_fitted"] else colour
                    axes.plot(row["workers"], row["measured"], "o", color=colour, markerfacecolor=fill)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{count} shard{'s' if count > 1 else ''}")
        panels.flat[0].legend(title="parameters")


def _growth(rows: Rows, file: Path) -> None:
    with plot(
        file,
        "Workers on links of 10 Gbit/s, BF16, one shard",
        "workers",
        "",
        figsize=(11, 4.5),
        ncols=2,
    ) as (rates, stale):
        kinds = list(dict.fromkeys((row["parameters"], row["local_steps"]) for row in rows))
        for (parameters, steps), colour in zip(kinds, COLOURS, strict=False):
            mine = [row for row in rows if (row["parameters"], row["local_steps"]) == (parameters, steps)]
            label = f"{_millions(parameters)}, {steps} step{'s' if steps > 1 else ''} a push"
            workers = [row["workers"] for row in mine]
            rates.plot(workers, [100 * row["of_ideal"] for row in mine], "o-", color=colour, label=label)
            stale.plot(workers, [max(row["staleness"], 0.1) for row in mine], "o-", color=colour, label=label)
        for axes in (rates, stale):
            axes.set_xscale("log")
        rates.set_ylabel("gradients that count, % of what the workers can compute")
        stale.set_yscale("log")
        stale.set_ylabel("staleness, steps")
        rates.legend()


def _shards(rows: Rows, file: Path) -> None:
    with plot(file, "64 workers on links of 400 Gbit/s, BF16", "shards", "gradients that count, a second") as axes:
        for parameters, colour in zip(dict.fromkeys(row["parameters"] for row in rows), COLOURS, strict=False):
            mine = [row for row in rows if row["parameters"] == parameters]
            counts = [row["shards"] for row in mine]
            axes.plot(counts, [row["effective_per_s"] for row in mine], "o-", color=colour, label=_millions(parameters))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row["shards"] for row in rows}), sorted({row["shards"] for row in rows}))
        axes.legend(title="parameters")


def _links(rows: Rows, file: Path) -> None:
    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    names = list(dict.fromkeys(row["link"] for row in rows))
    with plot(
        file,
        "32 workers and one shard: gradients that count, % of what the workers can compute",
        "each worker's link",
        "",
        figsize=(11, 4.5),
        ncols=len(sizes),
        squeeze=False,
    ) as panels:
        for axes, parameters in zip(panels.flat, sizes, strict=True):
            for way, colour in zip(dict.fromkeys(row["way"] for row in rows), COLOURS, strict=False):
                mine = [row for row in rows if (row["way"], row["parameters"]) == (way, parameters)]
                places = [names.index(row["link"]) for row in mine]
                axes.plot(places, [100 * row["of_ideal"] for row in mine], "o-", color=colour, label=way)
            axes.set_xticks(range(len(names)), names, rotation=20)
            axes.set_yscale("log")
            axes.set_title(_millions(parameters))
        panels.flat[0].legend()


def _failures(rows: Rows, file: Path) -> None:
    with plot(
        file,
        "32 workers and 4 shards that fail, for an hour",
        "mean time between failures of each worker and shard, hours",
        "computed gradients that are in the weights, %",
    ) as axes:
        kinds = list(dict.fromkeys((row["durability"], row["checkpoint_s"]) for row in rows))
        for (durability, checkpoint_s), colour in zip(kinds, COLOURS, strict=False):
            mine = [row for row in rows if (row["durability"], row["checkpoint_s"]) == (durability, checkpoint_s)]
            label = durability if durability == "journal" else f"{durability}, every {checkpoint_s:g} s"
            hours = [row["mtbf_s"] / 3600 for row in mine]
            axes.plot(hours, [100 * row["goodput"] for row in mine], "o-", color=colour, label=label)
        axes.set_xscale("log")
        axes.legend()


def _scaling(rows: Rows, file: Path) -> None:
    with plot(
        file,
        "6,000 gradients of 100 million parameters, 5 s each, on links of 10 Gbit/s, fp32, one shard",
        "minutes",
        "",
        figsize=(11, 7),
        nrows=3,
        sharex=True,
    ) as panels:
        for row, colour in zip(rows, COLOURS, strict=False):
            minutes = [look["at_s"] / 60 for look in row["looks"]]
            for axes, name in zip(panels, ("workers", "staleness", "push_s"), strict=True):
                axes.plot(minutes, [look[name] for look in row["looks"]], color=colour, label=row["name"])
        for axes, title in zip(panels, ("workers", "staleness, steps", "seconds of a push"), strict=True):
            axes.set_ylabel(title)
            axes.set_xlabel("minutes" if axes is panels[-1] else " ")
        panels[0].legend(ncols=2, fontsize=8)
