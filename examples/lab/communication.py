"""Communication: training loss against bytes sent, with a push a step and with many local steps between two pushes.

Four workers of a real service, under `sync`, train a small network. Those that push every step have AdamW Schedule-Free
at the service, as fp32 or BF16 both ways; those that push every H steps have AdamW of their own, and an outer optimizer
at the service. They take more steps, to see whether they come to the same loss with fewer bytes. Each has what is best
for the training loss at its end: the learning rate (of the inner optimizer, there), by the first seed; and one of a few
outer optimizers, by all seeds. Bytes are those of gradients and parameters, both ways, of all workers, without headers.
"""

from __future__ import annotations

import copy
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.lab.figures import COLOURS, Table, digits, percent, plot, plus_minus
from examples.lab.problems import mnist
from examples.lab.service import serving
from examples.lab.training import batches
from examples.lab.tuning import Trial, over_seeds, tune
from freestep import Client, LocalSteps, RemoteOptimizer
from freestep.api.models import Dtype

WORKERS, BATCH, SEEDS, STEPS = 4, 16, 3, 400
QUICK_SEEDS, QUICK_STEPS = 1, 10
LONGER = 2
"""How many times as many steps workers take that push every H of them."""
GRID, LOCAL_GRID, QUICK_GRID = (0.016, 0.032, 0.064), (0.002, 0.004, 0.008), (0.016, 0.032)
"""Learning rates to begin with, of pushes every step and of the inner AdamW; `tune` adds to them."""
LOOKS = 20
"""At how many steps, evenly, the loss is seen in the first STEPS; as often in those after them."""
_NEAR = 1.02
"""A loss is reached within 2% of it."""


@dataclass(frozen=True)
class Outer:
    """An outer optimizer: its algorithm, learning rate and momentum."""

    algorithm: str
    lr: float
    momentum: float

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.lr:g}, {self.momentum:g}"

    @property
    def options(self) -> dict[str, Any]:
        momenta = ("mu_x", "mu_y") if self.algorithm == "gpa_sgd" else ("momentum",)
        return {"algorithm": self.algorithm, "lr": self.lr, **dict.fromkeys(momenta, self.momentum)}


OUTERS = (Outer("diloco", 0.7, 0.9), Outer("gpa_sgd", 2.0, 0.8))
"""What is tried for each H; the first has `diloco`'s defaults."""
QUICK_OUTERS = OUTERS[1:]


@dataclass(frozen=True)
class Way:
    """How workers send: every so many steps, and as what."""

    every: int
    dtype: Dtype = "F32"

    @property
    def name(self) -> str:
        return f"every step, {self.dtype}" if self.every == 1 else f"every {self.every} steps"


WAYS = (Way(1), Way(1, "BF16"), Way(10), Way(50), Way(200))
QUICK_WAYS = (Way(1, "BF16"), Way(10))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 10))


def measure(quick: bool) -> dict[str, Any]:
    ways, seeds, steps = (QUICK_WAYS, QUICK_SEEDS, QUICK_STEPS) if quick else (WAYS, SEEDS, STEPS)
    parameters = sum(each.numel() for each in network().parameters())
    # Read here, before four threads ask for it at once.
    mnist(14)
    with serving() as service:
        runs = [_tuned(service.url, way, seeds, steps, parameters, quick) for way in ways]
    return {"parameters": parameters, "workers": WORKERS, "steps": steps, "runs": runs}


def _tuned(url: str, way: Way, seeds: int, steps: int, parameters: int, quick: bool) -> dict[str, Any]:
    grid = QUICK_GRID if quick else GRID if way.every == 1 else LOCAL_GRID
    outers: tuple[Outer | None, ...] = (None,) if way.every == 1 else QUICK_OUTERS if quick else OUTERS
    settings = [_tuned_with(url, way, outer, grid, seeds, steps) for outer in outers]
    setting, best = min(settings, key=lambda each: each[0]["train_loss"][0])
    # A worker's push and the pull that answers it.
    exchanged = WORKERS * 2 * parameters * (4 if way.dtype == "F32" else 2)
    curve = [
        [exchanged * look["step"] // way.every, *over_seeds([each["curve"][number] for each in best], "train_loss")]
        for number, look in enumerate(best[0]["curve"])
    ]
    at_steps = [next(look for look in each["curve"] if look["step"] == steps) for each in best]
    return {
        "way": way.name,
        **setting,
        "loss_at_steps": over_seeds(at_steps, "train_loss"),
        "test_accuracy": over_seeds(best, "test_accuracy"),
        "curve": curve,
        "settings": [each for each, _ in settings],
    }


def _tuned_with(
    url: str, way: Way, outer: Outer | None, grid: tuple[float, ...], seeds: int, steps: int
) -> tuple[dict[str, Any], Trial]:
    """The learning rate that is best on the first seed with an outer optimizer, and the runs with it of all seeds."""

    def run(lr: float, of: range = range(1)) -> Trial:
        return [_train(url, way, outer, lr, seed, steps) for seed in of]

    tuned = tune(run, grid, least=["train_loss"])
    lr = tuned.best["train_loss"]
    best = [*tuned.trials[lr], *run(lr, range(1, seeds))]
    setting = {"outer": outer and outer.name, "lr": lr, "at_edge": bool(tuned.at_edge)}
    return {**setting, "train_loss": over_seeds(best, "train_loss")}, best


def _train(url: str, way: Way, outer: Outer | None, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: its workers are threads of this process."""
    name, together = f"lab-{uuid.uuid4().hex[:8]}", Barrier(WORKERS)
    # At the ends of rounds, when x is what all have pushed.
    looks = {max(1, steps * number // LOOKS // way.every) * way.every for number in range(1, LOOKS * LONGER + 1)}
    torch.manual_seed(seed)
    # The run's weights are those of whichever worker is there first.
    first = network()
    models = [copy.deepcopy(first) for _ in range(WORKERS)]
    total = steps if way.every == 1 else steps * LONGER

    def work(number: int) -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        with _optimizer(url, name, way, outer, lr, number, models[number]) as optimizer:
            together.wait()
            return _curve(models[number], optimizer, seed * WORKERS + number, total, looks if number == 0 else set())

    with ThreadPoolExecutor(WORKERS) as pool, Client(url) as client:
        curve, *_ = [each.result() for each in [pool.submit(work, number) for number in range(WORKERS)]]
        client.run(name).delete()
    return {**curve[-1], "curve": curve}


def _optimizer(
    url: str, run: str, way: Way, outer: Outer | None, lr: float, number: int, model: nn.Module
) -> RemoteOptimizer:
    options: dict[str, Any] = {"url": url, "run": run, "worker": f"worker-{number}", "aggregation": "sync"}
    if outer is None:
        return RemoteOptimizer(model, lr=lr, push_dtype=way.dtype, pull_dtype=way.dtype, **options)
    # Fused, since four threads that make many small calls wait for each other.
    inner = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    return LocalSteps(model, inner, every=way.every, **outer.options, **options)


def _curve(
    model: nn.Module, optimizer: RemoteOptimizer, seed: int, steps: int, looks: set[int]
) -> list[dict[str, Any]]:
    """What a worker sees of x, which stays what it is while the others wait for this one."""
    images, labels, *_ = mnist(14)
    curve = []
    for step, chosen in enumerate(islice(batches(len(labels), BATCH, seed), steps), start=1):
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step(samples=BATCH)
        if step in looks:
            optimizer.eval()
            curve.append({"step": step, **_figures(model)})
            optimizer.train()
    return curve


@torch.no_grad()
def _figures(model: nn.Module) -> dict[str, float]:
    images, labels, test_images, test_labels = mnist(14)
    return {
        "train_loss": float(cross_entropy(model(images), labels)),
        "test_accuracy": float((model(test_images).argmax(1) == test_labels).float().mean()),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What each way comes to, with the bytes to two losses of the first's; and by which settings.

    The losses are that after a quarter of the first way's steps, and that at its end.
    """
    return [_losses(found), _settings(found)]


def _losses(found: dict[str, Any]) -> Table:
    plain = found["runs"][0]["curve"]
    targets = [plain[max(0, len(plain) // 4 - 1)], plain[-1]]
    rows = []
    for run in found["runs"]:
        row = [
            run["way"],
            plus_minus(*run["loss_at_steps"]),
            plus_minus(*run["train_loss"]) if run["outer"] else "",
            percent(*run["test_accuracy"]),
            digits(run["curve"][-1][0] / 1e6),
        ]
        for spent, loss, _ in targets:
            reached = next((sent for sent, its, _ in run["curve"] if its <= _NEAR * loss), None)
            row.append("not reached" if reached is None else f"{digits(spent / reached)} ×")
        rows.append(row)
    steps = found["steps"]
    to = [f"fewer bytes to {digits(_NEAR * loss)}" for _, loss, _ in targets]
    after = [f"training loss after {count:,} steps" for count in (steps, steps * LONGER)]
    model = f"{found['workers']} workers, {found['parameters']:,} parameters"
    return Table(f"{model}, steps of {BATCH} each", ["", *after, "test accuracy, last", "MB sent", *to], rows)


def _settings(found: dict[str, Any]) -> Table:
    """The loss in the end by the setting of the outer optimizer, where there is one, each with its best lr."""
    names = list(dict.fromkeys(each["outer"] for run in found["runs"] for each in run["settings"] if each["outer"]))
    rows = []
    for run in found["runs"]:
        cells = {
            each["outer"]: f"{plus_minus(*each['train_loss'])} ({each['lr']:g}{'*' * each['at_edge']})"
            for each in run["settings"]
        }
        rows.append([run["way"], *(cells.get(name, "") for name in (None, *names))])
    title = "training loss in the end, and in brackets the learning rate best by it (* the edge of the grid)"
    return Table(title, ["", "no outer optimizer", *names], rows)


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "Training loss against bytes sent"
    with plot(folder / "communication.png", title, "MB, of all workers, both ways", "training loss") as axes:
        for run, colour in zip(found["runs"], COLOURS, strict=False):
            sent, losses, _ = zip(*run["curve"], strict=True)
            axes.plot([each / 1e6 for each in sent], losses, color=colour, marker=".", label=run["way"])
        axes.set(xscale="log", yscale="log")
        axes.legend()
