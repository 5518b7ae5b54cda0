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
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.marked import fill

PUBLISHED, TRIED, PAGE = Path("docs/scale"), Path("scale-out"), Path("docs/scale.md")


def main() -> None:
    command = ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("--quick", action="store_true", help=f"less of all, to see that it works, to {TRIED}")
    command.add_argument("--more", action="store_true", help="measures again, beside what was measured before")
    command.add_argument("--simulate", action="store_true", help="takes what was measured before")
    command.add_argument("--redraw", action="store_true", help="tables and plots alone, of what was found before")
    command.add_argument("--out", type=Path, help=f"where results go; else {PUBLISHED}, or {TRIED} of a quick run")
    given = command.parse_args()
    folder = given.out or (TRIED if given.quick else PUBLISHED)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.perf_counter()
    if not (given.simulate or given.redraw):
        before = json.loads((folder / "measured.json").read_text()) if given.more else None
        _write(folder / "measured.json", measure(given.quick, before))
        print(f"measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        began = time.perf_counter()
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    if not given.redraw:
        _write(folder / "simulated.json", simulate(found, given.quick))
        print(f"simulated in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found |= json.loads((folder / "simulated.json").read_text())
    from benchmarks.scale import plots, tables
    from benchmarks.scale.validation import holds

    plots.draw(found, folder)
    made = tables.tables(found)
    if folder == PUBLISHED:
        fill(PAGE, made)
    print("\n\n".join(made.values()))
    sys.exit(0 if holds(found["compared"]) else 1)


def measure(quick: bool, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Throughput and CPU under load, and what the scripts of a push cost Redis. before: what was measured earlier."""
    from benchmarks.scale import measured, store_costs
    from benchmarks.scale.rules import opened_desk

    machine, taken = measured.machine(), measured.measure(quick)
    if before is not None:
        rounds = 1 + max(window["round"] for window in before["windows"])
        later = [window | {"round": rounds + window["round"]} for window in taken.windows]
        taken = measured.Measured(measured.points_of([*before["windows"], *later]), [*before["windows"], *later])
    with opened_desk() as desk:
        store = store_costs.measure(desk, quick)
    return {"machine": machine, **asdict(taken), "store": [asdict(each) for each in store]}


def simulate(found: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The costs of what was measured, the comparison with it, and the scenarios."""
    from benchmarks.scale import costs, fitting, scenarios, store_costs, validation
    from benchmarks.scale.measured import SHARDS, Point
    from benchmarks.scale.rules import opened_desk

    points = [Point(**each) for each in found["points"]]
    store = [store_costs.StoreCost(**each) for each in found["store"]]
    machine_cores = found["machine"]["cores"]
    with opened_desk() as desk:
        fitted = fitting.fit(points, machine_cores, desk)
        compared, busy = validation.compare(points, fitted, machine_cores, desk)
        more = costs.redis_call_more(points, store)
        costs_of = partial(costs.on_machines_of_their_own, fitted=fitted, store=store, call_more=more)
        return {
            "fitted": {str(shards): asdict(each) for shards, each in fitted.items()},
            "costs": {
                **asdict(costs_of(1)),
                "redis_call_more": more,
                "redis_waiting": store_costs.waiting_s(store, max(SHARDS)),
            },
            "busy": [asdict(each) for each in busy],
            "compared": [{**asdict(each), "error": each.error, "is_within": each.is_within} for each in compared],
            "simulated": scenarios.measure(costs_of, desk, quick),
        }


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    if missing := [name for name in ("simpy", "matplotlib") if find_spec(name) is None]:
        sys.exit(f"it needs {' and '.join(missing)}: pip install '.[dev]'")
    main()
