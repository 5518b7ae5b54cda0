"""All benchmarks, and one table of what they found beside what is to be reached: `make bench`.

Figures are medians of several runs; ratios are taken within a run, in which the subjects take turns so that all see
the same machine. A figure beyond its target is marked so, and nothing fails for it: other programs on the machine
move them. Only a benchmark that could not be run makes the exit code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.figures import Report, print_table
from benchmarks.options import Options, parser

NAMES = (
    "roundtrip",
    "rivals",
    "update",
    "robust",
    "small",
    "workers",
    "journal",
    "leases",
    "units",
    "events",
    "crowd",
    "startup",
    "sweep",
    "shards",
    "tls",
    "gpu",
)
"""Modules, each of which has a `report`."""


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--quick", action="store_true", help="fewer runs of smaller models, to see that all works")
    command.add_argument("--only", action="append", choices=NAMES, help="one benchmark; may be repeated")
    command.add_argument("--plot", type=Path, metavar="FILE", help="where to write the sweep's plot, a PNG")
    command.add_argument(
        "--peers-python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="the interpreter of an environment with peers in it (benchmarks/peers.txt); may be repeated",
    )
    given = command.parse_args()
    options = Options(given.quick, given.plot, given.peers_python)
    torch.set_num_threads(1)
    reports, failed = {}, []
    progress = Console(stderr=True)
    for name in given.only or NAMES:
        progress.print(f"{name} ...", highlight=False)
        try:
            reports[name] = import_module(f"benchmarks.{name}").report(options)
        except Exception as error:
            progress.print_exception()
            reports[name] = Report(notes=[f"not measured: {error!r}"])
            failed.append(name)
    if given.json:
        print(json.dumps({name: _document(report) for name, report in reports.items()}, indent=2))
    else:
        print_table(reports)
    sys.exit(1 if failed else 0)


def _document(report: Report) -> dict[str, object]:
    figures = [{**asdict(figure), "verdict": figure.verdict} for figure in report.figures]
    return {"figures": figures, "notes": report.notes, "details": report.details}


if __name__ == "__main__":
    main()
