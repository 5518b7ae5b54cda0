"""Convex problems: Schedule-Free SGD beside classical averaging, schedules that know the end, and those that do not.

Logistic regression on two sets of digits, which stand in for the USPS of the talk. Each method has its own learning
rate, the best of a grid by the final training loss, mean over seeds; and again by the test accuracy, since what is best
for the one is not for the other. Schedule-Free has the β of the package, 0.9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.lab.figures import COLOURS, Table, percent, plot, plus_minus
from examples.lab.problems import LogisticRegression, Problem, mnist, small_digits
from examples.lab.training import checkpoints, train
from examples.lab.tuning import over_seeds, tune

SEEDS, BATCH, EPOCHS = 3, 16, {"digits": 30, "MNIST-5k, 7 × 7": 12}
QUICK_SEEDS, QUICK_EPOCHS = 1, 1
GRID = tuple(2.0**power for power in range(-4, 2))
"""Learning rates to begin with; `tune` adds to them."""
QUICK_GRID = (0.05, 0.2)
LOOKS = 24

METHODS = (
    "Schedule-Free",
    "linear decay",
    "cosine",
    "Polyak averaging",
    "1/sqrt(t)",
    "momentum 0.9, flat",
    "flat",
)


def optimizer(method: str, lr: float, steps: int) -> dict[str, Any]:
    """What a run is created with; only the decays to an end take the number of steps."""
    sgd = {"algorithm": "sgd", "lr": lr}
    return {
        "Schedule-Free": {"algorithm": "sgd_schedule_free", "lr": lr, "momentum": 0.9},
        "linear decay": {**sgd, "schedule": {"name": "linear", "total_steps": steps}},
        "cosine": {**sgd, "schedule": {"name": "cosine", "total_steps": steps}},
        "Polyak averaging": {**sgd, "averaging": {"name": "polyak"}},
        "1/sqrt(t)": {**sgd, "schedule": {"name": "inverse_sqrt"}},
        "momentum 0.9, flat": {**sgd, "momentum": 0.9},
        "flat": sgd,
    }[method]


def measure(quick: bool) -> list[dict[str, Any]]:
    problems = [LogisticRegression("digits", small_digits()), LogisticRegression("MNIST-5k, 7 × 7", mnist(7))]
    return [_compared(problem, method, quick) for problem in problems for method in METHODS]


def _compared(problem: Problem, method: str, quick: bool) -> dict[str, Any]:
    """A method on a problem, at its best by each figure."""
    seeds, grid = (QUICK_SEEDS, QUICK_GRID) if quick else (SEEDS, GRID)
    steps = (QUICK_EPOCHS if quick else EPOCHS[problem.name]) * (problem.samples // BATCH)
    looks = checkpoints(steps, LOOKS)
    tuned = tune(
        lambda lr: [train(problem, optimizer(method, lr, steps), steps, BATCH, seed, looks) for seed in range(seeds)],
        grid,
        least=["train_loss"],
        most=["test_accuracy"],
    )
    case: dict[str, Any] = {"problem": problem.name, "method": method, "steps": steps, "at_edge": tuned.at_edge}
    for by, lr in tuned.best.items():
        trial = tuned.trials[lr]
        case[f"by {by}"] = {"lr": lr, **{name: over_seeds(trial, name) for name in ("train_loss", "test_accuracy")}}
    best = tuned.trials[tuned.best["train_loss"]]
    case["curve"] = [
        [look["step"], *over_seeds([run["curve"][number] for run in best], "train_loss")]
        for number, look in enumerate(best[0]["curve"])
    ]
    return case


def tables(found: list[dict[str, Any]]) -> list[Table]:
    made = []
    for problem in dict.fromkeys(case["problem"] for case in found):
        cases = [case for case in found if case["problem"] == problem]
        rows = []
        for case in cases:
            by_loss, by_accuracy = case["by train_loss"], case["by test_accuracy"]
            rows.append(
                [
                    case["method"],
                    f"{by_loss['lr']:g}" + "*" * ("train_loss" in case["at_edge"]),
                    plus_minus(*by_loss["train_loss"]),
                    percent(*by_loss["test_accuracy"]),
                    f"{by_accuracy['lr']:g}" + "*" * ("test_accuracy" in case["at_edge"]),
                    percent(*by_accuracy["test_accuracy"]),
                ]
            )
        heads = ["", "lr by loss", "training loss", "test accuracy", "lr by accuracy", "test accuracy then"]
        title = f"{problem}: after {cases[0]['steps']:,} steps of {BATCH} (* the edge of the grid)"
        made.append(Table(title, heads, rows))
    return made


def draw(found: list[dict[str, Any]], folder: Path) -> None:
    problems = list(dict.fromkeys(case["problem"] for case in found))
    title = "Logistic regression, each method with the learning rate of its best final loss"
    options = {"ncols": len(problems), "figsize": (10.5, 4.8)}
    with plot(folder / "convex.png", title, "steps", "training loss, mean and spread over seeds", **options) as panels:
        for axes, problem in zip(panels, problems, strict=True):
            cases = [case for case in found if case["problem"] == problem]
            for case, colour in zip(cases, COLOURS, strict=False):
                steps, losses, spreads = zip(*case["curve"], strict=True)
                low, high = zip(
                    *((loss - off, loss + off) for loss, off in zip(losses, spreads, strict=True)), strict=True
                )
                width = 2.2 if case["method"] == "Schedule-Free" else 1.2
                axes.plot(steps, losses, label=case["method"], color=colour, linewidth=width)
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            least = min(loss for case in cases for _, loss, _ in case["curve"])
            axes.set(title=problem, xscale="log", yscale="log")
            axes.set_ylim(bottom=least / 1.5)
        panels[0].legend()
