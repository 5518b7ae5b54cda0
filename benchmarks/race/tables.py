"""The tables of docs/race.md, by the name of the marker that each stands at; what was not run yet is left empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from benchmarks.race.curves import gradients_to, loss_after, mean_and_spread, seconds_to
from benchmarks.race.methods import METHODS, Method
from benchmarks.race.plan import FULL, chosen, in_order
from benchmarks.race.results import Results
from benchmarks.race.tasks import TASKS
from benchmarks.race.tuning import best_rate
from benchmarks.race.worlds import WORLDS, World
from examples.lab.figures import Table, digits, plus_minus

__all__ = ["tables"]

Races = Sequence[Mapping[str, Any]]
Cell = Callable[[Races], str]
Column = tuple[str, Callable[[World], str]]

_NOT_RUN, _NOT_RACED = "", "–"


def tables(results: Results) -> dict[str, str]:
    """Markdown by marker."""
    made = {"machine": _machine(results), "complete": _complete(results), "rates": _rates(results)}
    made |= {"short": _short(results), "plots": _plots(results)}
    for name, task in TASKS.items():
        made[f"seconds-{name}"] = "\n\n".join(
            _by_world(
                results,
                name,
                f"{name}: seconds to a loss of {target:g}",
                partial(_seconds, target=target),
                ("DDP at no cost", partial(_free_ddp, results, name, task.device_s, target)),
            )
            for target in task.targets
        )
        made[f"loss-{name}"] = _by_world(results, name, f"{name}: loss at the end", _last_loss)
        made[f"gradients-{name}"] = _by_world(results, name, f"{name}: gradients a second", _gradients)
        made[f"samples-{name}"] = _samples(results, name)
    return made


def _machine(results: Results) -> str:
    if not results.races:
        return "Nothing was run yet."
    has, races = results.machine, list(results.races.values())
    late = max((race["late"] for race in races if race["world"] != "fast"), default=0.0)
    ready = [race["ready_s"] for race in races]
    return (
        f"{has['cores']} cores ({has['processor']}), Linux {has['kernel']}, Python {has['python']}, torch "
        f"{has['torch']}. "
        f"The load before a race was {max(race['load'] for race in races):.1f} at most, of which the race before has a "
        f"part. Workers were ready {min(ready):.0f} to {max(ready):.0f} s after their start, which no figure contains. "
        f"A look at x was over {1e3 * max(race['behind_s'] for race in races):.0f} ms after its moment at most. "
        f"Computing took longer than the device's time for {late:.1%} of a race's gradients at most (`fast` apart)."
    )


def _complete(results: Results) -> str:
    """What of all that there is to run was run."""
    wanted = [f"{each.name}/{seed}" for each, seed in in_order(FULL, chosen(FULL))]
    has = sum(name in results.races for name in wanted)
    lines = [f"Of {len(wanted)} races, {has} were run."]
    if has < len(wanted):
        lines.append("Cells that are empty are of races that were not run yet.")
    lines += [f"`{name}` was left out: {why}." for name, why in results.missing.items()]
    return " ".join(lines)


def _short(results: Results) -> str:
    """Seconds to a loss by DDP, by freestep's default, and by the first of all.

    The loss is the task's first; where somebody is killed, the last, since the others are reached before that.
    """
    rows = []
    for (task, of), world in product(TASKS.items(), WORLDS.values()):
        target = of.targets[-1 if world.kill_mean else 0]
        raced = {each.name: races for each in METHODS.values() if (races := _of(results, world.name, each.name, task))}
        if raced:
            shown = ["torchrun" if world.kill_mean else "ddp", "ringmaster"]
            cells = [_seconds(raced[name], target) if name in raced else _NOT_RUN for name in shown]
            rows.append([f"{task} to {target:g}, {world.says}", *cells, _first(raced, target)])
    return Table("seconds to a loss", ["", "DDP", "freestep `ringmaster`", "first of all"], rows).markdown()


def _plots(results: Results) -> str:
    tasks = [name for name in TASKS if any(race["task"] == name for race in results.races.values())]
    return "\n\n".join(f"![The loss over time on {name}, by world](race/{name}.png)" for name in tasks)


def _first(raced: Mapping[str, Races], target: float) -> str:
    """The method with the most seeds that came to the loss; of several, that with the least mean of their seconds."""
    arrivals = []
    for name, races in raced.items():
        reached = [each for each in (seconds_to(race["curve"], target) for race in races) if each is not None]
        if reached:
            arrivals.append((1 - len(reached) / len(races), mean_and_spread(reached)[0], name))
    if not arrivals:
        return "none"
    _, _, name = min(arrivals)
    return f"{METHODS[name].says}: {_seconds(raced[name], target)}"


def _rates(results: Results) -> str:
    rows = []
    for task in TASKS:
        for method in METHODS.values():
            losses = results.losses(task, method.name)
            if losses:
                tried = ", ".join(f"{rate:g}: {digits(loss)}" for rate, loss in losses.items())
                rows.append([f"{task}, {method.says}", f"{best_rate(losses):g}", tried])
    return Table("learning rates, and the losses that they came to", ["", "chosen", "tried"], rows).markdown()


def _by_world(results: Results, task: str, title: str, cell: Cell, more: Column | None = None) -> str:
    """more: the head of one more column, and what it says of a world."""
    worlds = [world for world in WORLDS.values() if _is_raced(world, task) or _has(results, world, task)]
    methods = [method for method in METHODS.values() if any(method.races_in(world) for world in worlds)]
    heads = ["", *(method.says for method in methods), *([more[0]] if more else [])]
    rows = []
    for world in worlds:
        cells = [_cell(results, world, method, task, cell) for method in methods]
        rows.append([world.says, *cells, *([more[1](world)] if more else [])])
    return Table(title, heads, rows).markdown()


def _is_raced(world: World, task: str) -> bool:
    return any((each.world, each.task) == (world.name, task) for each in chosen(FULL))


def _has(results: Results, world: World, task: str) -> bool:
    return any((race["world"], race["task"]) == (world.name, task) for race in results.races.values())


def _cell(results: Results, world: World, method: Method, task: str, cell: Cell) -> str:
    if not method.races_in(world):
        return _NOT_RACED
    races = _of(results, world.name, method.name, task)
    return cell(races) if races else _NOT_RUN


def _of(results: Results, world: str, method: str, task: str) -> Races:
    wanted = (world, method, task)
    return [race for race in results.races.values() if (race["world"], race["method"], race["task"]) == wanted]


def _seconds(races: Races, target: float) -> str:
    found = [seconds_to(race["curve"], target) for race in races]
    reached = [each for each in found if each is not None]
    if not reached:
        return f"not in {races[0]['seconds']:g} s"
    average, spread = mean_and_spread(reached)
    of = f" ({len(reached)} of {len(found)})" if len(reached) < len(found) else ""
    return f"{average:.1f} ± {spread:.1f}{of}"


def _free_ddp(results: Results, task: str, device_s: float, target: float, world: World) -> str:
    """When DDP would be there if a step lasted as long as its slowest gradient, and all else were free."""
    races = _of(results, "equal", "ddp", task)
    if world.drawn > 1 or world.kill_mean is not None or world.is_linked or world.device < 1:
        return _NOT_RACED
    found = [gradients_to(race["curve"], target) for race in races]
    if not races:
        return _NOT_RUN
    if None in found:
        return "not reached"
    step_s = world.device * device_s * max(world.slow, 1.0)
    average, _ = mean_and_spread(step_s * gradients / FULL.workers for gradients in found if gradients is not None)
    return f"{average:.1f}"


def _last_loss(races: Races) -> str:
    return plus_minus(*mean_and_spread(race["curve"][-1][2] for race in races))


def _gradients(races: Races) -> str:
    average, _ = mean_and_spread(race["curve"][-1][1] / race["seconds"] for race in races)
    return digits(average)


def _samples(results: Results, task: str) -> str:
    """The loss by gradients and not by time, in the world of equal workers: what all have computed at least."""
    methods = [method for method in METHODS.values() if _of(results, "equal", method.name, task)]
    races = {method.name: _of(results, "equal", method.name, task) for method in methods}
    if not methods:
        return "Of this task, nothing was run in the world of equal workers yet."
    least = min(race["curve"][-1][1] for of in races.values() for race in of)
    marks = [least // 4, least // 2, least]
    rows = []
    for method in methods:
        found = [[loss_after(race["curve"], mark) for race in races[method.name]] for mark in marks]
        rows.append(
            [method.says, *(plus_minus(*mean_and_spread(each for each in of if each is not None)) for of in found)]
        )
    heads = ["", *(f"{mark:,}" for mark in marks)]
    return Table(f"{task}, equal workers: loss after so many gradients", heads, rows).markdown()
