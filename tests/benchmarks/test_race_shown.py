"""What the race keeps and shows: results, curves, tables, plots; and short races of real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from benchmarks.marked import fill
from benchmarks.race.curves import gradients_to, loss_after, mean_and_spread, seconds_to
from benchmarks.race.looks import moments
from benchmarks.race.one_race import Race
from benchmarks.race.plan import FULL, QUICK, chosen
from benchmarks.race.plots import draw
from benchmarks.race.results import Results
from benchmarks.race.tables import tables
from benchmarks.race.tasks import TASKS

ROOT = Path(__file__).parents[2]
MACHINE = {"cores": 2, "processor": "P", "kernel": "6", "python": "3", "torch": "2"}
CURVE = [[0.0, 0, 2.0, 0.1], [1.0, 100, 1.0, 0.5], [2.0, 300, 0.5, 0.8], [3.0, 400, 0.6, 0.8]]


# Results


def test_a_race_that_was_run_is_known_by_how_it_was_run(tmp_path: Path) -> None:
    race = Race("equal", "ddp", "digits", 0, 0.005, 4, 8.0, 0.5)
    others = [replace(race, seed=1), replace(race, lr=0.01), replace(race, seconds=10.0)]
    results = Results(tmp_path / "new" / "results.json")
    assert not results.has(race) and results.trial(race) is None and results.losses("digits", "ddp") == {}
    results.put_trial(race, 0.25)
    results.put_trial(replace(race, lr=0.0025), inf)
    results.put_missing("equal/ddp/digits", "a reason")
    results.put(race, {"curve": CURVE})
    again = Results(tmp_path / "new" / "results.json")
    assert again.has(race) and again.missing == {}
    assert again.trial(race) == 0.25
    assert again.losses("digits", "ddp") == {0.0025: inf, 0.005: 0.25}
    assert not any(again.has(other) or again.trial(other) is not None for other in others)


def test_what_is_forgotten_is_of_those_that_are_named(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results(file)
    kept, gone = (Race("equal", method, "digits", 0, 0.005, 4, 8.0, 0.5) for method in ("ddp", "ringmaster"))
    for race in (kept, gone):
        results.put_trial(race, 0.25)
        results.put(race, {"curve": CURVE})
    results.forget(chosen(FULL, ["equal/ringmaster/digits"]))
    again = Results(file)
    assert again.has(kept) and again.trial(kept) == 0.25
    assert not again.has(gone) and again.trial(gone) is None


# Curves, tables, plots


def test_a_loss_is_reached_between_two_looks() -> None:
    assert seconds_to(CURVE, 1.5) == 0.5
    assert seconds_to(CURVE, 0.75) == 1.5
    assert gradients_to(CURVE, 0.75) == 200
    assert seconds_to(CURVE, 2.5) == 0.0
    assert seconds_to(CURVE, 0.4) is None


def test_a_loss_is_of_so_many_gradients() -> None:
    assert loss_after(CURVE, 50) == 1.5
    assert loss_after(CURVE, 400) == 0.6
    assert loss_after(CURVE, 401) is None
    # While nobody computed.
    assert loss_after([CURVE[0], [1.0, 0, 2.0, 0.1], [2.0, 10, 1.0, 0.1]], 0) == 2.0


def test_one_value_has_no_spread() -> None:
    assert mean_and_spread([3.0]) == (3.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def found(world: str, method: str, seed: int, curve: list[list[float]]) -> dict[str, Any]:
    how = {"world": world, "method": method, "task": "digits", "seed": seed, "seconds": 3.0, "lr": 0.1}
    return {
        **how,
        "load": 0.5,
        "ready_s": 4.0,
        "behind_s": 0.01,
        "late": 0.001,
        "steps": 3,
        "computed": 400,
        "curve": curve,
    }


def cells(table: str, row: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_what_was_run_and_leave_out_what_was_not(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    target, _ = TASKS["digits"].targets
    good = [[0.0, 0, 2.0, 0.1], [1.0, 200, target, 0.9], [3.0, 400, target / 2, 0.95]]
    for seed, curve in zip(FULL.seeds, (good, CURVE), strict=False):
        results.races[f"equal/ddp/digits/{seed}"] = found("equal", "ddp", seed, curve)
    results.races["equal/sync/digits/0"] = found("equal", "sync", 0, good)
    results.missing["link/ddp/digits"] = "no root"
    results.machine = MACHINE
    made = tables(results)
    table, _ = made["seconds-digits"].split("\n\n**")
    row = dict(zip(cells(table, ""), cells(table, "equal workers"), strict=True))
    assert row["DDP"] == "1.0 ± 0.0 (1 of 2)"
    assert row["freestep `sync`"] == "1.0 ± 0.0"
    assert row["freestep DiLoCo"] == ""
    assert row["DDP at no cost"] == "not reached"
    (short,) = [line for line in made["short"].splitlines() if "equal workers" in line]
    assert [cell.strip() for cell in short.strip("|").split("|")] == [
        f"digits to {target:g}, equal workers",
        "1.0 ± 0.0 (1 of 2)",
        "",
        "freestep `sync`: 1.0 ± 0.0",
    ]
    assert "no root" in made["complete"] and "3 were run" in made["complete"]
    assert "2 cores (P)" in made["machine"]
    assert cells(made["gradients-digits"], "equal workers")[1] == "133"


def test_ddp_at_no_cost_makes_a_step_as_long_as_the_slowest_gradient(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    (target, _), device_s = TASKS["digits"].targets, TASKS["digits"].device_s
    curve = [[0.0, 0, 2.0, 0.1], [1.0, 4000, target, 0.9]]
    results.races["equal/ddp/digits/0"] = found("equal", "ddp", 0, curve)
    results.machine = MACHINE
    table, _ = tables(results)["seconds-digits"].split("\n\n**")
    # 4,000 gradients are 1,000 steps.
    assert cells(table, "equal workers")[-1] == f"{1000 * device_s:.1f}"
    assert cells(table, "one of four 6 times slower")[-1] == f"{6000 * device_s:.1f}"
    assert cells(table, "100 Mbit/s, 50 ms")[-1] == "–"


def test_nothing_run_is_shown_as_that(tmp_path: Path) -> None:
    made = tables(Results(tmp_path / "results.json"))
    assert made["machine"] == "Nothing was run yet."
    assert "0 were run" in made["complete"]
    draw({}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plot_has_a_panel_for_each_world(tmp_path: Path) -> None:
    races = {
        f"{world}/{method}/{seed}": found(world, method, seed, CURVE)
        for world, method in (("equal", "ddp"), ("equal", "sync"), ("kills", "torchrun"))
        for seed in range(2)
    }
    draw(races, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["digits.png"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_marked_tables_are_replaced_and_all_else_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made: one -->\nold\n<!-- end -->\nafter\n")
    fill(page, {"one": "new", "other": "unused"})
    assert page.read_text() == "before\n<!-- made: one -->\nnew\n<!-- end -->\nafter\n"
    page.write_text("<!-- made: two -->\n<!-- end -->")
    with pytest.raises(KeyError):
        fill(page, {"one": "new"})


def test_the_page_has_every_table() -> None:
    page = (ROOT / "docs" / "race.md").read_text()
    assert [name for name in tables(Results(ROOT / "none")) if f"<!-- made: {name} -->" not in page] == []


# Real races


def race(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), *map(str, (ROOT / "client", ROOT / "service"))]
    )
    command = [sys.executable, "-m", "benchmarks.race", *arguments]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_short_races_are_run_once_and_drawn(tmp_path: Path) -> None:
    done = race("--quick", "--out", str(tmp_path))
    assert done.stderr.count("gradients, loss") == 2
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document["races"]) == {"equal/ddp/digits/0", "slow-6/ringmaster/digits/0"}
    for each in document["races"].values():
        seconds, gradients, losses, _ = zip(*each["curve"], strict=True)
        assert list(seconds) == [0.0, *moments(0.8, QUICK.look_s)]
        assert gradients[0] == 0 < gradients[-1] and list(gradients) == sorted(gradients)
        assert losses[-1] < losses[0]
        assert each["steps"] > 0
    # The slow one of two holds nobody up.
    assert document["races"]["slow-6/ringmaster/digits/0"]["computed"] > 0
    assert (tmp_path / "digits.png").exists()
    again = race("--quick", "--out", str(tmp_path))
    assert "gradients, loss" not in again.stderr
    assert "equal workers" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_on_hosts_of_their_own_meet_over_slow_links(tmp_path: Path) -> None:
    race("--quick", "--only", "link/ddp/digits", "--out", str(tmp_path))
    document = json.loads((tmp_path / "results.json").read_text())
    if not document["races"]:
        pytest.skip(document["missing"]["link/ddp/digits"])
    # A sum of two ranks takes a way there and back at least.
    assert 0 < document["races"]["link/ddp/digits/0"]["steps"] < 0.8 / 0.05
