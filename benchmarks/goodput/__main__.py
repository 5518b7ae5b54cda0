"""Useful pushes of those computed, and the wait after a SIGKILL, beside DDP: `python -m benchmarks.goodput`.

Processes are killed at random, by a seed, and started again at once. A push is useful if it is in the final weights.
All jobs train the same model on the same digits with the same kills; DDP, which has no service, loses rank 0 where
freestep loses its service. Both write checkpoints equally often.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.goodput.accounting import Outcome
from benchmarks.goodput.jobs import run_ddp, run_freestep
from benchmarks.goodput.kills import schedule
from benchmarks.goodput.plot import draw
from benchmarks.options import parser


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--quick", action="store_true", help="10 s for each, with a mean of 5 s only")
    command.add_argument("--means", type=float, nargs="+", default=[5.0, 15.0, 60.0], help="seconds between kills")
    command.add_argument("--durabilities", nargs="*", default=["none", "checkpoint", "journal"])
    command.add_argument("--without-ddp", action="store_true")
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--seconds", type=float, default=40.0, help="of a run, or twice the mean if that is longer")
    command.add_argument("--checkpoint-seconds", type=float, default=5.0)
    command.add_argument(
        "--seed", type=int, default=146, help="by default one by which both kinds are hit in every run"
    )
    command.add_argument("--plot", type=Path, metavar="FILE")
    given = command.parse_args()
    means, least = ([5.0], 10.0) if given.quick else (given.means, given.seconds)
    outcomes: list[Outcome] = []
    for mean in means:
        seconds = max(least, 2 * mean)
        kills = schedule(given.seed, mean, seconds, given.workers)
        for job in [*given.durabilities, *([] if given.without_ddp else [None])]:
            print(f"{mean:g} s between kills, {job or 'DDP'}: {len(kills)} kills ...", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="freestep-goodput-") as place:
                common = {
                    "seconds": seconds,
                    "workers": given.workers,
                    "checkpoint_seconds": given.checkpoint_seconds,
                    "folder": Path(place),
                }
                try:
                    outcomes.append(
                        run_ddp(mean, kills, **common) if job is None else run_freestep(job, mean, kills, **common)
                    )
                except BaseException:
                    log = Path(place, "log")
                    print(log.read_text()[-4000:] if log.exists() else "", file=sys.stderr)
                    raise
    if given.plot is not None:
        draw(outcomes, given.plot)
    line = shlex.join(["python", "-m", "benchmarks.goodput", *sys.argv[1:]])
    if given.json:
        runs = [{**asdict(each), "share": each.share} for each in outcomes]
        print(json.dumps({"command": line, "cores": os.cpu_count(), "runs": runs}, indent=2))
    else:
        _print_table(outcomes, line)


def _print_table(outcomes: Sequence[Outcome], line: str) -> None:
    table = Table(title=f"{line} ({os.cpu_count()} cores)", title_justify="left", box=box.SIMPLE_HEAD)
    names = (
        "between kills",
        "job",
        "computed",
        "useful",
        "share",
        "useful/s",
        "after a worker's kill",
        "the service's",
    )
    for name in names:
        table.add_column(name, justify="right" if name != "job" else "left")
    for each in outcomes:
        table.add_row(
            f"{each.mean:g} s",
            each.job,
            f"{each.computed:,}",
            f"{each.useful:,}",
            f"{each.share:.1%}",
            f"{each.useful / each.seconds:.1f}",
            _waits(each.after_worker),
            _waits(each.after_service),
        )
    Console(width=140).print(table)


def _waits(found: Sequence[float | None]) -> str:
    """The median of those that ended, how many did, and of how many kills."""
    ended = [wait for wait in found if wait is not None]
    return f"{median(ended):.2f} s ({len(ended)} of {len(found)})" if ended else f"- (0 of {len(found)})"


if __name__ == "__main__":
    main()
