"""Runs experiments of the lab, and writes what they found, its tables and its plots: `make lab LAB=NAME`.

What was found is kept as NAME.json, so that tables (NAME.md) and plots can be made again without the runs:
`--redraw`. An experiment is a module of this package with three functions:

    measure(quick) -> what was found, of JSON's types only; all random numbers are seeded
    tables(found)  -> the tables that show it
    draw(found, folder) -> writes the plots that show it, NAME*.png
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from examples.lab.figures import markdown

NAMES = ("convex", "anytime", "theorem", "delay", "staleness", "communication", "language", "units")
"""Modules of this package, each an experiment."""

PUBLISHED, TRIED = Path("docs/lab"), Path("lab-out")
"""Where results go: those of whole runs, which docs/lab.md quotes, and those of quick ones."""


def main() -> None:
    command = ArgumentParser(prog="python -m examples.lab", description=__doc__)
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=f"which: {', '.join(NAMES)}")
    command.add_argument("--quick", action="store_true", help="a run of seconds, to see that all works")
    command.add_argument("--redraw", action="store_true", help="tables and plots anew, of what was found before")
    command.add_argument("--out", type=Path, help=f"where results go; else {PUBLISHED}, or {TRIED} of a quick run")
    given = command.parse_args()
    folder = given.out or (TRIED if given.quick else PUBLISHED)
    # One thread, so that what was found can be found again, and as many experiments as cores can share a machine.
    torch.set_num_threads(1)
    for name in given.names:
        run(name, folder, quick=given.quick, redraw=given.redraw)


def run(name: str, folder: Path, *, quick: bool, redraw: bool = False) -> Any:
    """Runs an experiment, or takes what it found before, and writes its files to the folder; returns what it found."""
    experiment = import_module(f"examples.lab.{name}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    if not redraw:
        began, used = time.perf_counter(), time.process_time()
        found = experiment.measure(quick)
        taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
        document = {"made": {**_circumstances(name, quick), **taken}, "found": found}
        file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    document = json.loads(file.read_text())
    text = markdown(experiment.tables(document["found"]))
    (folder / f"{name}.md").write_text(text)
    print(text)
    experiment.draw(document["found"], folder)
    return document["found"]


def _circumstances(name: str, quick: bool) -> dict[str, Any]:
    """What the figures may depend on, beside the code."""
    words = ["python", "-m", "examples.lab", name, *(["--quick"] if quick else [])]
    return {"command": shlex.join(words), "python": platform.python_version(), "torch": torch.__version__}


if __name__ == "__main__":
    if find_spec("matplotlib") is None:
        sys.exit("the lab needs the extra demo: pip install '.[demo]'")
    main()
