"""Communication: training loss against bytes sent, with a push a step and with many local steps between two pushes.

Four workers of a real service, under `sync`, train a small network. Those that push every step have AdamW Schedule-Free
at the service, as fp32 or BF16 both ways; those that push every H steps have AdamW of their own, and DiLoCo's outer
optimizer with its defaults at the service. Each has the learning rate (of the inner optimizer, there) that is best for
the final training loss. Bytes are those of gradients and parameters, both ways, of all workers, without headers.
"""

from __future__ import annotations

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
from freestep.models import Dtype

WORKERS, BATCH, SEEDS, STEPS = 4, 16, 2, 600
QUICK_SEEDS, QUICK_STEPS = 1, 20
GRID, QUICK_GRID = (0.004, 0.008, 0.016), (0.004, 0.008)
"""Learning rates to begin with; `tune` adds to them."""
LOOKS = 60
_NEAR = 1.02
"""A loss is reached within 2% of it."""


@dataclass(frozen=True)
class Way:
    """How workers send: every so many steps, and as what."""

    every: int
    dtype: Dtype = "F32"

    @property
    def name(self) -> str:
        return f"every step, {self.dtype}" if self.every == 1 else f"every {self.every} steps"


WAYS = (Way(1), Way(1, "BF16"), Way(10), Way(50), Way(200))
QUICK_WAYS = (Way(1), Way(1, "BF16"), Way(10))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 10))


def measure(quick: bool) -> dict[str, Any]:
    ways, seeds, steps, grid = (
        (QUICK_WAYS, QUICK_SEEDS, QUICK_STEPS, QUICK_GRID) if quick else (WAYS, SEEDS, STEPS, GRID)
    )
    parameters = sum(each.numel() for each in network().parameters())
    with serving() as service:
        runs = [_tuned(service.url, way, grid, seeds, steps, parameters) for way in ways]
    return {"parameters": parameters, "workers": WORKERS, "steps": steps, "runs": runs}


def _tuned(url: str, way: Way, grid: tuple[float, ...], seeds: int, steps: int, parameters: int) -> dict[str, Any]:
    def run(lr: float) -> Trial:
        return [_train(url, way, lr, seed, steps) for seed in range(seeds)]

    tuned = tune(run, grid, least=["train_loss"])
    lr = tuned.best["train_loss"]
    best = tuned.trials[lr]
    # A worker's push and the pull that answers it.
    exchanged = WORKERS * 2 * parameters * (4 if way.dtype == "F32" else 2)
    curve = [
        [exchanged * look["step"] // way.every, over_seeds([each["curve"][number] for each in best], "train_loss")[0]]
        for number, look in enumerate(best[0]["curve"])
    ]
    figures = {figure: over_seeds(best, figure) for figure in ("train_loss", "test_accuracy")}
    return {"way": way.name, "lr": lr, "at_edge": bool(tuned.at_edge), **figures, "curve": curve}


def _train(url: str, way: Way, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: its workers are threads of this process."""
    name, together = f"lab-{uuid.uuid4().hex[:8]}", Barrier(WORKERS)
    # At the ends of rounds, when x is what all have pushed.
    looks = {max(1, steps * number // LOOKS // way.every) * way.every for number in range(1, LOOKS + 1)}
    torch.manual_seed(seed)
    models = [network() for _ in range(WORKERS)]

    def work(number: int) -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        with _optimizer(url, name, way, lr, number, models[number]) as optimizer:
            together.wait()
            return _curve(models[number], optimizer, seed * WORKERS + number, steps, looks if number == 0 else set())

    with ThreadPoolExecutor(WORKERS) as pool, Client(url) as client:
        curve, *_ = [each.result() for each in [pool.submit(work, number) for number in range(WORKERS)]]
        client.run(name).delete()
    return {**curve[-1], "curve": curve}


def _optimizer(url: str, run: str, way: Way, lr: float, number: int, model: nn.Module) -> RemoteOptimizer:
    options: dict[str, Any] = {"url": url, "run": run, "worker": f"worker-{number}", "aggregation": "sync"}
    if way.every > 1:
        return LocalSteps(model, torch.optim.AdamW(model.parameters(), lr=lr), every=way.every, **options)
    return RemoteOptimizer(model, lr=lr, push_dtype=way.dtype, pull_dtype=way.dtype, **options)


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
    """What each way ends with, and the bytes to the loss that the first way has at half its steps and at its end."""
    plain = found["runs"][0]["curve"]
    targets = [plain[len(plain) // 2 - 1], plain[-1]]
    rows = []
    for run in found["runs"]:
        row = [
            run["way"],
            f"{run['lr']:g}" + "*" * run["at_edge"],
            plus_minus(*run["train_loss"]),
            percent(*run["test_accuracy"]),
            digits(run["curve"][-1][0] / 1e6),
        ]
        for spent, loss in targets:
            reached = next((sent for sent, its in run["curve"] if its <= _NEAR * loss), None)
            row.append("not reached" if reached is None else f"{digits(spent / reached)} ×")
        rows.append(row)
    to = [f"fewer bytes to {digits(_NEAR * loss)}" for _, loss in targets]
    heads = ["", "lr", "training loss", "test accuracy", "MB sent", *to]
    model = f"{found['workers']} workers, {found['parameters']:,} parameters"
    title = f"{model}, {found['steps']:,} steps of {BATCH} each (* the edge of the grid)"
    return [Table(title, heads, rows)]


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "Training loss against bytes sent"
    with plot(folder / "communication.png", title, "MB, of all workers, both ways", "training loss") as axes:
        for run, colour in zip(found["runs"], COLOURS, strict=False):
            sent, losses = zip(*run["curve"], strict=True)
            axes.plot([each / 1e6 for each in sent], losses, color=colour, marker=".", label=run["way"])
        axes.set(xscale="log", yscale="log")
        axes.legend()
