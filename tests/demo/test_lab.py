"""The lab: its experiments run, and its page shows what they found."""

from __future__ import annotations

import json
from importlib import import_module
from math import inf
from pathlib import Path

import pytest

from examples.lab.__main__ import NAMES, PUBLISHED, run
from examples.lab.figures import markdown, plus_minus
from examples.lab.tuning import Trial, tune

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "lab.md"

LONG = pytest.mark.timeout(600)
"""Seconds: experiments start many processes that import torch, which is slow on a busy machine."""


def parabola(best: float) -> list[float]:
    """The learning rates that a grid of 1, 2 and 4 comes to try, and its best, where `best` is the true one."""
    tried: list[float] = []

    def trial(lr: float) -> Trial:
        tried.append(lr)
        return [{"loss": abs(lr / best - best / lr) + noise} for noise in (-0.1, 0.1)]

    tuned = tune(trial, (1.0, 2.0, 4.0), least=["loss"])
    assert sorted(tried) == sorted(tuned.trials)
    return [*sorted(tried), tuned.best["loss"], *([inf] if tuned.at_edge else [])]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (2.0, [1.0, 2.0, 4.0, 2.0]),
        (8.0, [1.0, 2.0, 4.0, 8.0, 16.0, 8.0]),
        (0.5, [0.25, 0.5, 1.0, 2.0, 4.0, 0.5]),
        (2.0**20, [*(2.0**power for power in range(11)), 2.0**10, inf]),
    ],
    ids=["inside", "above", "below", "out of reach"],
)
def test_a_grid_grows_until_its_best_is_inside(best: float, expected: list[float]) -> None:
    assert parabola(best) == expected


def test_runs_that_come_to_nothing_are_never_the_best() -> None:
    tuned = tune(lambda lr: [{"accuracy": None if lr > 2 else lr}], (1.0, 2.0, 4.0), most=["accuracy"])
    assert tuned.best == {"accuracy": 2.0}
    assert not tuned.at_edge


@pytest.mark.parametrize(
    ("average", "spread", "expected"),
    [(0.12345, 0.0123, "0.123 ± 0.012"), (0.12342, 0.0002, "0.1234 ± 0.0002"), (inf, inf, "diverged")],
)
def test_means_have_the_digits_that_count(average: float, spread: float, expected: str) -> None:
    assert plus_minus(average, spread) == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "theorem" else [pytest.mark.slow, pytest.mark.evidence, LONG])
        for name in NAMES
    ],
)
def test_an_experiment_writes_its_table_and_its_plot(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, quick=True)
    table, plot = tmp_path / f"{name}.md", tmp_path / f"{name}.png"
    assert "| --- |" in table.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    first = table.read_text()
    table.unlink()
    plot.unlink()
    run(name, tmp_path, quick=True, redraw=True)
    assert table.read_text() == first
    assert plot.exists()


def test_the_gap_is_below_the_bound_of_theorem_1(tmp_path: Path) -> None:
    found = run("theorem", tmp_path, quick=True)
    assert {case["problem"] for case in found} == {"largest", "deviations"}
    for case in [*found, *json.loads((ROOT / PUBLISHED / "theorem.json").read_text())["found"]]:
        assert case["gap"] <= case["bound"]


@pytest.mark.slow
@pytest.mark.evidence
@LONG
def test_units_count_as_often_whoever_is_slow(tmp_path: Path) -> None:
    found = run("units", tmp_path, quick=True)
    shares, *with_units = found["runs"]
    assert shares["of_slow"][0] < shares["of_fast"][0] / 2
    for each in with_units:
        assert each["least"] == each["most"] == [found["passes"], 0.0]
        assert each["dropped"][0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_was_found(name: str) -> None:
    document = json.loads((ROOT / PUBLISHED / f"{name}.json").read_text())
    page = PAGE.read_text()
    assert "--quick" not in document["made"]["command"]
    assert document["made"]["command"] in page
    assert markdown(import_module(f"examples.lab.{name}").tables(document["found"])) in page
    for plot in sorted((ROOT / PUBLISHED).glob(f"{name}*.png")):
        assert f"(lab/{plot.name})" in page
        assert plot.stat().st_size < 100_000
