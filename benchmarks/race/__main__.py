"""The race against synchronous training: `python -m benchmarks.race`.

Methods train the same model on the same data with the same workers in the same worlds, each with a learning rate that
was found by the same rule; docs/race.md says how and shows what came of it. Results are kept after each race, and
those that are there are not run again, so the whole may be run in parts. {estimate}
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch

from benchmarks.marked import fill
from benchmarks.race.one_race import run
from benchmarks.race.plan import FULL, QUICK, chosen, estimated_s
from benchmarks.race.results import Results
from benchmarks.race.session import Session
from freestep.demo.options import end_on_signals

PUBLISHED, TRIED, PAGE = Path("docs/race"), Path("race-out"), Path("docs/race.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where races failed."""
    minutes = estimated_s(FULL, chosen(FULL)) / 60
    estimate = f"All that runs where --only names nothing takes about {minutes:.0f} minutes: let nothing else run then."
    command = ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").format(estimate=estimate))
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("--quick", action="store_true", help=f"seconds of two races, to see that it works, to {TRIED}")
    command.add_argument("--redraw", action="store_true", help="tables and plots alone, of what was found before")
    command.add_argument("--again", action="store_true", help="forgets first what was found before of what is named")
    command.add_argument("--list", action="store_true", help="what would be run, and how long it would take")
    command.add_argument(
        "--only",
        default="",
        metavar="NAME[,NAME]",
        help="worlds such as kills, or WORLD/METHOD/TASK such as 'slow-6/*/digits'",
    )
    command.add_argument(
        "--minutes", type=float, default=inf, help="begins no race that would end later; the same command goes on"
    )
    command.add_argument("--out", type=Path, help=f"where results go; else {PUBLISHED}, or {TRIED} of --quick")
    given = command.parse_args(arguments)
    plan, folder = QUICK if given.quick else FULL, given.out or (TRIED if given.quick else PUBLISHED)
    try:
        entrants = chosen(plan, [name for name in given.only.split(",") if name])
    except ValueError as error:
        command.error(str(error))
    if given.list:
        print("\n".join(each.name for each in entrants))
        print(f"about {estimated_s(plan, entrants) / 60:.0f} minutes, if none of it was run before")
        return
    # What was seen is evaluated on one thread: two wait for each other while the last race's processes end.
    torch.set_num_threads(1)
    results, failures = Results(folder / "results.json"), []
    # Processes end with this one, also where a signal ends it.
    end_on_signals()
    if not given.redraw:
        if given.again:
            results.forget(entrants)
        with tempfile.TemporaryDirectory(prefix="freestep-race-data-") as data:
            session = Session(plan, results, Path(data), run, 60 * given.minutes)
            session.race(entrants)
            failures = session.failures
    from benchmarks.race import plots, tables

    plots.draw(results.races, folder)
    made = tables.tables(results)
    if folder == PUBLISHED:
        fill(PAGE, made)
    print("\n\n".join(made.values()))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
