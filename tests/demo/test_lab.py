"""The lab: its experiments run, and its page shows what they found."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from itertools import cycle, islice
from math import inf
from pathlib import Path

import pytest
import torch

from examples.lab.__main__ import NAMES, PUBLISHED, run
from examples.lab.figures import markdown, plus_minus
from examples.lab.local import LocalRun
from examples.lab.small_problems import PROBLEMS
from examples.lab.staleness import AHEAD, Lanes, arrivals, optimizer, train
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


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_many_runs_are_those_of_each(name: str) -> None:
    problem = PROBLEMS[name]()
    weights = torch.stack([problem.initial(seed) for seed in range(4)]).view(2, 2, -1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.stack(parts) for parts in zip(*(problem.batch(generator, 3) for _ in range(2)), strict=True)]
    found = problem.gradients(weights, *batches)
    for rate in range(2):
        for seed in range(2):
            leaf = weights[rate, seed].clone().requires_grad_()
            (wanted,) = torch.autograd.grad(problem.loss(leaf, *(each[seed] for each in batches)), leaf)
            torch.testing.assert_close(found[rate, seed], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["SGD", "AdamW", "NorMuon"])
def test_runs_side_by_side_are_the_runs_alone(form: str) -> None:
    problem, rates = PROBLEMS["network"](), (0.02, 0.1)
    made_with = optimizer(form, AHEAD, 0, 0)
    lanes = Lanes(problem, made_with, rates, seeds=2)
    alone = {}
    for rate in rates:
        own = {"base": made_with["base"] | {"lr": rate}} if "base" in made_with else {"lr": rate}
        for seed in range(2):
            alone[rate, seed] = LocalRun(made_with | own, problem.initial(seed), shapes=problem.shapes)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        gradients = torch.randn(2, 2, problem.numel, generator=generator)
        lanes.push(gradients, staleness=min(step, 3), live=4)
        for place, run_ in enumerate(alone.values()):
            run_.push(gradients.view(4, -1)[place], staleness=min(step, 3), live=4)
    for place, run_ in enumerate(alone.values()):
        for point in ("x", "y", "z"):
            assert torch.equal(lanes.point(point).view(4, -1)[place], run_.point(point))


def test_workers_in_turn_push_gradients_that_are_as_stale_as_the_others_are_many() -> None:
    problem = PROBLEMS["quadratic"]()
    lanes = Lanes(problem, optimizer("SGD", AHEAD, 0, 0), [0.1], seeds=1)
    staleness, workers = train([problem] * 4, lanes, islice(cycle(range(4)), 10), seeds=1, batch=1)
    assert staleness == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert workers == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    lanes = Lanes(problem, optimizer("SGD", AHEAD, 0, 0), [0.1], seeds=1)
    staleness, _ = train([problem] * 4, lanes, islice(cycle(range(4)), 10), seeds=1, batch=1, most_stale=1)
    assert max(staleness) == 1
    assert lanes.step == len(staleness) < 10


def test_workers_come_as_often_as_they_are_fast() -> None:
    come = Counter(arrivals([1.0, 1.0, 8.0], 1700))
    assert come[0] == pytest.approx(800, rel=0.05)
    assert come[2] == pytest.approx(100, rel=0.1)


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
