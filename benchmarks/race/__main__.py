"""The race against synchronous training: `python -m benchmarks.race`.

Methods train the same model on the same data with the same workers in the same worlds, each with a learning rate that
was found by the same rule; docs/race.md says how and shows what came of it. Results are kept after each race, and
those that are there are not run again. {estimate}
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.race.methods import METHODS
from benchmarks.race.one_race import Race, run
from benchmarks.race.places import Unavailable
from benchmarks.race.plan import FULL, QUICK, Entrant, Plan, chosen, estimated_s, tuned
from benchmarks.race.results import Results
from benchmarks.race.tuning import best_rate, tune
from benchmarks.race.worlds import WORLDS
from freestep.demo.options import end_on_signals

PUBLISHED, TRIED, PAGE = Path("docs/race"), Path("race-out"), Path("docs/race.md")
Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> None:
    minutes = estimated_s(FULL, chosen(FULL)) / 60
    estimate = f"All that runs where --only names nothing takes about {minutes:.0f} minutes: let nothing else run then."
    command = ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").format(estimate=estimate))
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("--quick", action="store_true", help=f"seconds of two races, to see that it works, to {TRIED}")
    command.add_argument("--redraw", action="store_true", help="tables and plots alone, of what was found before")
    command.add_argument("--again", action="store_true", help="also races that were run, and learning rates")
    command.add_argument("--list", action="store_true", help="what would be run, and how long it would take")
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORLD/METHOD/TASK",
        help="such as 'slow-6/*/digits'; may be repeated",
    )
    command.add_argument("--out", type=Path, help=f"where results go; else {PUBLISHED}, or {TRIED} of --quick")
    given = command.parse_args(arguments)
    plan, folder = QUICK if given.quick else FULL, given.out or (TRIED if given.quick else PUBLISHED)
    try:
        entrants = chosen(plan, given.only)
    except ValueError as error:
        command.error(str(error))
    if given.list:
        print("\n".join(each.name for each in entrants))
        print(f"about {estimated_s(plan, entrants) / 60:.0f} minutes, if none of it was run before")
        return
    results = Results(folder / "results.json")
    # Processes end with this one, also where a signal ends it.
    end_on_signals()
    if not given.redraw:
        race_all(plan, entrants, results, given.again)
    from benchmarks.race import plots, tables

    plots.draw(results.races, folder)
    if folder == PUBLISHED:
        tables.write(PAGE, results)
    print("\n\n".join(tables.tables(results).values()))


def race_all(plan: Plan, entrants: Sequence[Entrant], results: Results, again: bool) -> None:
    """Runs what results lack, or all of it."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="freestep-race-data-") as data:
        entrants = [each for each in entrants if _can_run(each, results, say)]
        rates: dict[tuple[str, str], float] = {}
        for task, method in tuned(entrants):
            rates[task, method] = _rate(plan, task, method, results, again, Path(data), say)
        for each in entrants:
            lr = rates[each.task, METHODS[each.method].tuned_as or each.method]
            for seed in plan.seeds:
                _race(_planned(plan, each, seed, lr), results, again, Path(data), say)


def _planned(plan: Plan, entrant: Entrant, seed: int, lr: float) -> Race:
    seconds = plan.share * WORLDS[entrant.world].seconds
    return Race(entrant.world, entrant.method, entrant.task, seed, lr, plan.workers, seconds, plan.look_s)


def _can_run(entrant: Entrant, results: Results, say: Say) -> bool:
    why = METHODS[entrant.method].missing()
    if why is not None:
        say(f"{entrant.name} is left out: {why}")
        results.put_missing(entrant.name, why)
    return why is None


def _rate(plan: Plan, task: str, method: str, results: Results, again: bool, data: Path, say: Say) -> float:
    """The method's learning rate: what was found before, or by trial in the world of equal workers."""
    grid = METHODS[method].grid[: plan.rates]
    if len(grid) == 1:
        return grid[0]
    losses = results.losses(task, method)
    if losses is None or not set(grid) <= set(losses) or again:

        def loss(lr: float) -> float:
            race = _planned(plan, Entrant("equal", method, task), plan.tuning_seed, lr)
            last = float(run(race, data)["curve"][-1][2])
            say(f"tuning {method}/{task}: {lr:g} comes to {last:.3f}")
            return last

        losses = tune(loss, grid)
        results.put_losses(task, method, losses)
    return best_rate(losses)


def _race(race: Race, results: Results, again: bool, data: Path, say: Say) -> None:
    name = f"{race.world}/{race.method}/{race.task}, seed {race.seed}"
    if results.has(race) and not again:
        return
    say(f"{name}, learning rate {race.lr:g}, {race.seconds:g} s ...")
    try:
        found = run(race, data)
    except Unavailable as reason:
        say(f"{name} is left out: {reason}")
        results.put_missing(f"{race.world}/{race.method}/{race.task}", str(reason))
        return
    results.put(race, found)
    _, gradients, loss, accuracy = found["curve"][-1]
    say(f"  {found['steps']} steps, {gradients} gradients, loss {loss:.3f}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
