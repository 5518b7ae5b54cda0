"""Anytime: one Schedule-Free run beside runs of several lengths whose schedules know their end.

A small network on digits. Each schedule of each length has the learning rate that is best for its own end, mean over
seeds. The Schedule-Free run has one learning rate, chosen at its last step, and is looked at where the others end; the
claim is that it is no worse there than runs made for that length. What Schedule-Free has with the learning rate that
is best for each length stands beside it, so that the two questions do not mix. All that is done twice: by training
loss, and by test accuracy.
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
    # A curve has its looks at all lengths, so that it can be read there.
    looks = sorted({*checkpoints(max(lengths), LOOKS), *lengths})
    one = _tuned(problem, {"algorithm": "sgd_schedule_free", "momentum": 0.9}, max(lengths), looks, quick)
    by_schedule = {
        name: [_tuned(problem, _scheduled(name, steps), steps, looks, quick) for steps in lengths] for name in SCHEDULES
    }
    return {
        "problem": problem.name,
        "parameters": problem.numel,
        "lengths": lengths,
        **{
            figure: {
                "Schedule-Free": _best(one, figure),
                "Schedule-Free by length": [_best_at(one, figure, steps) for steps in lengths],
                **{name: [_best(tuned, figure) for tuned in all_tuned] for name, all_tuned in by_schedule.items()},
            }
            for figure in FIGURES
        },
    }


def _scheduled(name: str, steps: int) -> dict[str, Any]:
    return {"algorithm": "sgd", "schedule": {"name": name, "total_steps": steps}}


def _tuned(problem: Problem, optimizer: dict[str, Any], steps: int, looks: list[int], quick: bool) -> Tuned:
    seeds = range(QUICK_SEEDS if quick else SEEDS)

    def run(lr: float) -> Trial:
        return [train(problem, {**optimizer, "lr": lr}, steps, BATCH, seed, looks) for seed in seeds]

    return tune(run, QUICK_GRID if quick else GRID, least=["train_loss"], most=["test_accuracy"])


def _best(tuned: Tuned, figure: str) -> dict[str, Any]:
    lr = tuned.best[figure]
    curve = [_look(tuned.trials[lr], number) for number in range(len(tuned.trials[lr][0]["curve"]))]
    return {"lr": lr, "at_edge": figure in tuned.at_edge, "curve": curve}


def _best_at(tuned: Tuned, figure: str, steps: int) -> dict[str, Any]:
    """The best of the runs of all learning rates, as they were after so many steps."""
    looks = {
        lr: _look(trial, number)
        for lr, trial in tuned.trials.items()
        for number, look in enumerate(trial[0]["curve"])
        if look["step"] == steps and all(len(run["curve"]) > number for run in trial)
    }
    sign = -1 if figure == "test_accuracy" else 1
    lr = min(looks, key=lambda each: sign * looks[each][figure][0])
    return {"lr": lr, "at_edge": lr in (min(looks), max(looks)), "curve": [looks[lr]]}


def _look(trial: Trial, number: int) -> dict[str, Any]:
    looks = [run["curve"][number] for run in trial]
    return {"step": looks[0]["step"], **{figure: over_seeds(looks, figure) for figure in FIGURES}}


def tables(found: dict[str, Any]) -> list[Table]:
    losses, others, accuracies = [], [], []
    for number, steps in enumerate(found["lengths"]):
        by_loss, by_accuracy = ([_at(run, steps) for run in _compared(found[by], number)] for by in FIGURES)
        ratio = by_loss[0]["train_loss"][0] / min(look["train_loss"][0] for look in by_loss[2:])
        cells = [plus_minus(*look["train_loss"]) for look in by_loss]
        losses.append([f"{steps:,}", *map(_with_lr, cells, _compared(found["train_loss"], number)), digits(ratio)])
        others.append([f"{steps:,}", *(percent(*look["test_accuracy"]) for look in by_loss)])
        cells = [percent(*look["test_accuracy"]) for look in by_accuracy]
        accuracies.append([f"{steps:,}", *map(_with_lr, cells, _compared(found["test_accuracy"], number))])
    heads = ["steps", "Schedule-Free, one run", "Schedule-Free, lr of the length", "cosine", "linear decay"]
    return [
        Table(
            "training loss, and in brackets the learning rate, best by it (* the edge of the grid)",
            [*heads, "one run by the best schedule"],
            losses,
        ),
        Table("test accuracy of the same runs", heads, others),
        Table("test accuracy, and in brackets the learning rate, best by it", heads, accuracies),
    ]


def _compared(by_figure: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The runs of a row: what ends, or is looked at, after the length of that number."""
    names = ("Schedule-Free by length", *SCHEDULES)
    return [by_figure["Schedule-Free"], *(by_figure[name][number] for name in names)]


def _with_lr(cell: str, run: dict[str, Any]) -> str:
    return f"{cell} ({run['lr']:g}{'*' * run['at_edge']})"


def _at(run: dict[str, Any], steps: int) -> dict[str, Any]:
    found: dict[str, Any] = next(look for look in run["curve"] if look["step"] == steps)
    return found


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "One Schedule-Free run, and runs of several lengths, each at its best by what is shown"
    options = {"ncols": 2, "figsize": (10.5, 4.8)}
    with plot(folder / "anytime.png", title, "steps", "", **options) as panels:
        for axes, figure in zip(panels, FIGURES, strict=True):
            for name, colour in zip(SCHEDULES, COLOURS[1:], strict=False):
                for run in found[figure][name]:
                    steps, values = _line(run["curve"], figure)
                    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.6)
                    axes.plot(steps[-1:], values[-1:], color=colour, marker="o", linestyle="")
                axes.plot([], [], color=colour, marker="o", label=f"{name}, a run of each length")
            steps, values = _line(found[figure]["Schedule-Free"]["curve"], figure)
            axes.plot(steps, values, color=COLOURS[0], linewidth=2.2, label="Schedule-Free, one run")
            axes.set(xscale="log", ylabel=figure.replace("train_", "training ").replace("_", " "))
        panels[0].set_yscale("log")
        panels[1].set_ylim(bottom=0.7)
        panels[0].legend()


def _line(curve: list[dict[str, Any]], figure: str) -> tuple[list[int], list[float]]:
    return [look["step"] for look in curve], [look[figure][0] for look in curve]
