"""Anytime: one Schedule-Free run beside runs of several lengths whose schedules know their end.

A small network on digits. Each schedule of each length has the learning rate that is best for its own final training
loss, mean over seeds. The Schedule-Free run has one learning rate, chosen at its last step, and is looked at where the
others end; the claim is that it is no worse there than runs made for that length. What Schedule-Free has with the
learning rate that is best for each length stands beside it, so that the two questions do not mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.lab.figures import COLOURS, Table, digits, percent, plot, plus_minus
from examples.lab.problems import Network, Problem, mnist
from examples.lab.training import checkpoints, train
from examples.lab.tuning import Trial, Tuned, over_seeds, tune

SEEDS, BATCH, LENGTHS = 3, 16, (250, 500, 1000, 2000, 4000)
QUICK_SEEDS, QUICK_LENGTHS = 2, (50, 100)
GRID = (0.0625, 0.125, 0.25, 0.5, 1.0)
"""Learning rates to begin with; `tune` adds to them."""
QUICK_GRID = (0.1, 0.4)
LOOKS = 24
SCHEDULES = ("cosine", "linear")
FIGURES = ("train_loss", "test_accuracy")


def measure(quick: bool) -> dict[str, Any]:
    lengths = QUICK_LENGTHS if quick else LENGTHS
    problem = Network("MNIST-5k, 14 × 14", mnist(14), hidden=32)
    found: dict[str, Any] = {"problem": problem.name, "parameters": problem.numel, "lengths": lengths}
    # A curve has its looks at all lengths, so that it can be read there.
    looks = sorted({*checkpoints(max(lengths), LOOKS), *lengths})
    schedule_free = _tuned(problem, {"algorithm": "sgd_schedule_free", "momentum": 0.9}, max(lengths), looks, quick)
    found["Schedule-Free"] = _best(schedule_free)
    found["Schedule-Free by length"] = [_best_at(schedule_free, steps) for steps in lengths]
    for name in SCHEDULES:
        found[name] = [
            _best(
                _tuned(
                    problem,
                    {"algorithm": "sgd", "schedule": {"name": name, "total_steps": steps}},
                    steps,
                    [look for look in looks if look <= steps],
                    quick,
                )
            )
            for steps in lengths
        ]
    return found


def _tuned(problem: Problem, optimizer: dict[str, Any], steps: int, looks: list[int], quick: bool) -> Tuned:
    seeds = range(QUICK_SEEDS if quick else SEEDS)

    def run(lr: float) -> Trial:
        return [train(problem, {**optimizer, "lr": lr}, steps, BATCH, seed, looks) for seed in seeds]

    return tune(run, QUICK_GRID if quick else GRID, least=["train_loss"])


def _best(tuned: Tuned) -> dict[str, Any]:
    lr = tuned.best["train_loss"]
    curve = [_look(tuned.trials[lr], number) for number in range(len(tuned.trials[lr][0]["curve"]))]
    return {"lr": lr, "at_edge": bool(tuned.at_edge), "curve": curve}


def _best_at(tuned: Tuned, steps: int) -> dict[str, Any]:
    """The best of the runs of all learning rates, as they were after so many steps."""
    looks = {
        lr: _look(trial, number)
        for lr, trial in tuned.trials.items()
        for number, look in enumerate(trial[0]["curve"])
        if look["step"] == steps and all(len(run["curve"]) > number for run in trial)
    }
    lr = min(looks, key=lambda each: looks[each]["train_loss"][0])
    return {"lr": lr, "at_edge": lr in (min(looks), max(looks)), **looks[lr]}


def _look(trial: Trial, number: int) -> dict[str, Any]:
    looks = [run["curve"][number] for run in trial]
    return {"step": looks[0]["step"], **{figure: over_seeds(looks, figure) for figure in FIGURES}}


def _at(curve: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    return next(look for look in curve if look["step"] == steps)


def tables(found: dict[str, Any]) -> list[Table]:
    losses, accuracies, rates = [], [], []
    for number, steps in enumerate(found["lengths"]):
        one = _at(found["Schedule-Free"]["curve"], steps)
        own = found["Schedule-Free by length"][number]
        ends = [found[name][number]["curve"][-1] for name in SCHEDULES]
        ratio = one["train_loss"][0] / min(end["train_loss"][0] for end in ends)
        cells = [plus_minus(*look["train_loss"]) for look in (one, own, *ends)]
        losses.append([f"{steps:,}", *cells, digits(ratio)])
        accuracies.append([f"{steps:,}", *(percent(*look["test_accuracy"]) for look in (one, own, *ends))])
        chosen = [found["Schedule-Free"], own, *(found[name][number] for name in SCHEDULES)]
        rates.append([f"{steps:,}", *(f"{each['lr']:g}" + "*" * each["at_edge"] for each in chosen)])
    heads = ["steps", "Schedule-Free, one run", "Schedule-Free, lr of the length", "cosine", "linear decay"]
    return [
        Table("training loss", [*heads, "one run by the best schedule"], losses),
        Table("test accuracy", heads, accuracies),
        Table("learning rates (* the edge of the grid)", heads, rates),
    ]


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "One Schedule-Free run, and cosine and linear runs of several lengths"
    options = {"ncols": 2, "figsize": (10.5, 4.8)}
    with plot(folder / "anytime.png", title, "steps", "", **options) as (losses, accuracies):
        for axes, figure in ((losses, "train_loss"), (accuracies, "test_accuracy")):
            for name, colour in zip(SCHEDULES, COLOURS[1:], strict=False):
                for run in found[name]:
                    steps, values = _line(run["curve"], figure)
                    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.6)
                    axes.plot(
                        steps[-1:],
                        values[-1:],
                        color=colour,
                        marker="o",
                        label=name if run is found[name][-1] else None,
                    )
            steps, values = _line(found["Schedule-Free"]["curve"], figure)
            axes.plot(steps, values, color=COLOURS[0], linewidth=2.2, label="Schedule-Free, one run")
            axes.set(xscale="log")
        losses.set(yscale="log", ylabel="training loss")
        accuracies.set(ylabel="test accuracy")
        accuracies.set_ylim(bottom=0.7)
        losses.legend()


def _line(curve: list[dict[str, Any]], figure: str) -> tuple[list[int], list[float]]:
    return [look["step"] for look in curve], [look[figure][0] for look in curve]
