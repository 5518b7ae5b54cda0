"""How far a service goes: `make scale` measures it here, simulates it beyond, and writes the figures of docs/scale.md.

What was measured is kept as measured.json and what was simulated as simulated.json, in the folder of the plots. The
tables of the page stand between markers. The exit code is 1 if the simulation misses more than one in ten of the
measured points that no cost was fitted on by more than it may.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import measured

PUBLISHED, TRIED, PAGE = Path("docs/scale"), Path("scale-out"), Path("docs/scale.md")
_LEAST_WITHIN = 0.9


def main() -> None:
    command = ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("--quick", action="store_true", help=f"less of all, to see that it works, to {TRIED}")
    command.add_argument("--simulate", action="store_true", help="takes what was measured before")
    command.add_argument("--redraw", action="store_true", help="tables and plots alone, of what was found before")
    command.add_argument("--out", type=Path, help=f"where results go; else {PUBLISHED}, or {TRIED} of a quick run")
    given = command.parse_args()
    folder = given.out or (TRIED if given.quick else PUBLISHED)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.perf_counter()
    if not (given.simulate or given.redraw):
        machine = measured.machine()
        points = measured.measure(given.quick)
        _write(folder / "measured.json", {"machine": machine, "points": [asdict(point) for point in points]})
        print(f"measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        began = time.perf_counter()
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    if not given.redraw:
        points = [measured.Point(**point) for point in found["points"]]
        _write(folder / "simulated.json", simulated(points, found["machine"]["cores"], given.quick))
        print(f"simulated in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found |= json.loads((folder / "simulated.json").read_text())
    from benchmarks.scale import plots, tables

    plots.draw(found, folder)
    if folder == PUBLISHED:
        tables.written(PAGE, found)
    made = tables.tables(found)
    print("\n\n".join(made.values()))
    judged = [row["is_within"] for row in found["compared"] if not row["is_fitted"]]
    sys.exit(0 if sum(judged) >= _LEAST_WITHIN * len(judged) else 1)


def simulated(points: Sequence[measured.Point], cores: int, quick: bool) -> dict[str, Any]:
    """What the scripts cost Redis, the comparison with what was measured, and the scenarios."""
    from benchmarks.scale import costs, scenarios, store_costs, validation
    from benchmarks.scale.rules import opened_desk

    with opened_desk() as desk:
        store = store_costs.measure(desk, quick)
        compared = validation.compare(points, cores, desk, store_costs.waiting_s(store))
        fitted, more = validation.fit(points), costs.redis_call_more(points, store)
        costs_of = partial(costs.on_machines_of_their_own, fitted=fitted, store=store, call_more=more)
        return {
            "store": [asdict(each) for each in store],
            "fitted": {str(shards): asdict(each) for shards, each in fitted.items()},
            "costs": {**asdict(costs_of(1)), "redis_call_more": more},
            "compared": [{**asdict(each), "error": each.error, "is_within": each.is_within} for each in compared],
            "simulated": scenarios.measure(costs_of, desk, quick),
        }


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    if missing := [name for name in ("simpy", "matplotlib") if find_spec(name) is None]:
        sys.exit(f"it needs {' and '.join(missing)}: pip install '.[dev]'")
    main()
