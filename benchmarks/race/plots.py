"""The plots of docs/race.md: a task's loss over time, a panel for each world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.curves import mean_and_spread
from benchmarks.race.methods import METHODS
from benchmarks.race.tasks import TASKS
from benchmarks.race.worlds import WORLDS
from examples.lab.figures import COLOURS, plot

__all__ = ["draw"]

_COLUMNS = 4
_COLOUR = dict(
    zip(METHODS, ("#555555", "#555555", "#a8831a", COLOURS[4], COLOURS[0], COLOURS[2], COLOURS[3]), strict=True)
)
"""DDP alone and under torchrun never meet in a panel."""


def draw(races: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Writes the plots of tasks that have races."""
    for name, task in TASKS.items():
        mine = [race for race in races.values() if race["task"] == name]
        if mine:
            _draw(mine, f"{name}: {task.says}", task.targets, folder / f"{name}.png")


def _draw(races: Sequence[Mapping[str, Any]], title: str, targets: Sequence[float], file: Path) -> None:
    worlds = [world for world in WORLDS.values() if any(race["world"] == world.name for race in races)]
    columns = min(_COLUMNS, len(worlds))
    rows = -(-len(worlds) // columns)
    size = {"figsize": (3.4 * columns + 0.6, 3.2 * rows + 0.9), "nrows": rows, "ncols": columns, "squeeze": False}
    with plot(file, title, "seconds", "loss on what is held out", sharey=True, **size) as panels:
        for axes, world in zip(panels.flat, worlds, strict=False):
            axes.set_title(world.says, fontsize="medium")
            for target in targets:
                axes.axhline(target, color="#bbbbbb", linewidth=1)
            for method in METHODS.values():
                mine = [race for race in races if (race["world"], race["method"]) == (world.name, method.name)]
                if mine:
                    _line(axes, mine, method.says.replace("`", ""), _COLOUR[method.name])
            axes.set_yscale("log")
            axes.legend(fontsize="x-small")
        for axes in panels.flat[len(worlds) :]:
            axes.set_visible(False)


def _line(axes: Any, races: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
    """The mean over seeds, and the range of a standard deviation around it."""
    looks = list(zip(*(race["curve"] for race in races), strict=True))
    seconds = [points[0][0] for points in looks]
    losses = [mean_and_spread(point[2] for point in points) for points in looks]
    axes.plot(seconds, [average for average, _ in losses], color=colour, label=label)
    low, high = zip(*((average - spread, average + spread) for average, spread in losses), strict=True)
    axes.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
