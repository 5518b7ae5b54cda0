"""Units: how often the data of a slow worker counts under `ringmaster`, with shares of the data and with units of it.

Five workers of a real service train a small network on MNIST-5k. One is slow: between its gradient and its push the
others push up to LATE times, and `ringmaster` drops what is too stale by then. Each worker has two classes of its own,
so that what is lost with the slow one's pushes can be seen: as shares, which each goes over again and again, until the
run has had as many pushes as there are batches in all passes; or as a data set each, whose units are handed out until
all have counted. Or all classes are one data set, whose units any of them takes. What has counted is known by receipts.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.lab.figures import COLOURS, Table, percent, plot, plus_minus
from examples.lab.problems import mnist
from examples.lab.service import serving
from examples.lab.training import batches
from examples.lab.tuning import over_seeds
from freestep import Client, RemoteOptimizer, Units

FAST, BATCH, LR = 4, 16, 0.005
CLASSES = [(2 * worker, 2 * worker + 1) for worker in range(FAST + 1)]
"""Those of each worker, the slow one last."""
LATE, MOST = 12, 6
"""How many pushes of others a slow push is late at the most, and how many `ringmaster` accepts."""
PASSES, SEEDS = 4, 3
QUICK_PASSES, QUICK_SEEDS = 1, 1
WAYS = ("shares", "a data set each", "one data set")


class Pace:
    """Has the slow worker wait for pushes of the fast ones."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._pushes = 0
        self._working = FAST

    def pushed(self) -> None:
        with self._changed:
            self._pushes += 1
            self._changed.notify_all()

    def ended(self) -> None:
        """Notes that a fast worker has nothing left to do."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def wait(self, pushes: int, is_over: Callable[[], bool]) -> None:
        """Waits for so many of them, or until nobody is left who would push."""
        with self._changed:
            until = self._pushes + pushes
            self._changed.wait_for(lambda: self._pushes >= until or not self._working or is_over())


def measure(quick: bool) -> dict[str, Any]:
    passes, seeds = (QUICK_PASSES, QUICK_SEEDS) if quick else (PASSES, SEEDS)
    # Read here, before all threads ask for it at once.
    mnist(14)
    with serving() as service:
        runs = {way: [_train(service.url, way, passes, seed) for seed in range(seeds)] for way in WAYS}
    return {
        "passes": passes,
        "runs": [
            {"way": way, **{name: over_seeds(of_way, name) for name in of_way[0] if name != "by_class"}}
            | {"by_class": [over_seeds([each["by_class"] for each in of_way], str(digit)) for digit in range(10)]}
            for way, of_way in runs.items()
        ],
    }


def _train(url: str, way: str, passes: int, seed: int) -> dict[str, Any]:
    """One run: its workers are threads of this process."""
    _, labels, *_ = mnist(14)
    name, pace = f"lab-{uuid.uuid4().hex[:8]}", Pace()
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 10)) for _ in CLASSES]

    def work(worker: int) -> tuple[Tensor, int, int]:
        torch.set_num_threads(1)
        is_slow = worker == FAST
        counted, pushed, dropped = torch.zeros(len(labels)), 0, 0
        policy = {"policy": "ringmaster", "max_staleness": MOST}
        with RemoteOptimizer(
            models[worker], url=url, run=name, worker=f"worker-{worker}", lr=LR, aggregation=policy
        ) as optimizer:
            chosen_of, is_over = _data(optimizer, way, worker, passes, seed)
            late = random.Random(seed)
            for chosen in chosen_of:
                optimizer.zero_grad()
                _loss(models[worker], chosen).backward()  # type: ignore[no-untyped-call]
                if is_slow:
                    pace.wait(late.randint(1, LATE), is_over)
                optimizer.step()
                assert optimizer.receipt is not None
                pushed += 1
                if optimizer.receipt.decision == "applied":
                    counted[chosen] += 1
                else:
                    dropped += 1
                if not is_slow:
                    pace.pushed()
            if not is_slow:
                pace.ended()
        return counted, pushed, dropped

    with ThreadPoolExecutor(len(CLASSES)) as pool, Client(url) as client:
        made = list(pool.map(work, range(len(CLASSES))))
        x, _ = client.run(name).pull("x")
        client.run(name).delete()
    counted = torch.stack([each for each, _, _ in made]).sum(0)
    models[0].load_state_dict(x)
    return {**_figures(counted, models[0]), "dropped": made[-1][2] / made[-1][1]}


def _data(
    optimizer: RemoteOptimizer, way: str, worker: int, passes: int, seed: int
) -> tuple[Iterator[Tensor], Callable[[], bool]]:
    """The batches of a worker, as indices; and whether nobody else has anything to do but what is out with it."""
    _, labels, *_ = mnist(14)
    own = torch.isin(labels, torch.tensor(CLASSES[worker])).nonzero().flatten()
    if way == "shares":
        total = passes * len(labels) // BATCH
        return _until(optimizer, total, (own[each] for each in batches(len(own), BATCH, seed))), lambda: False
    if way == "one data set":
        units = Units(optimizer, len(labels), unit=BATCH, passes=passes, seed=seed)
        return (torch.arange(each.start, each.stop) for each in units), lambda: units.status().open == 0
    units = Units(optimizer, len(own), unit=BATCH, passes=passes, seed=seed, name=optimizer.worker)
    return (own[each.start : each.stop] for each in units), lambda: False


def _until(optimizer: RemoteOptimizer, steps: int, of: Iterator[Tensor]) -> Iterator[Tensor]:
    """Ends with the run's last step."""
    for chosen in of:
        if optimizer.loaded.step >= steps:
            return
        yield chosen


def _loss(model: nn.Module, chosen: Tensor) -> Tensor:
    images, labels, *_ = mnist(14)
    return cross_entropy(model(images[chosen]), labels[chosen])


@torch.no_grad()
def _figures(counted: Tensor, model: nn.Module) -> dict[str, Any]:
    """How often examples counted, and how many of the test x knows, of the classes of the fast workers and the slow."""
    _, labels, images, test_labels = mnist(14)
    hits = (model(images).argmax(1) == test_labels).float()
    slow, test_slow = (torch.isin(each, torch.tensor(CLASSES[-1])) for each in (labels, test_labels))
    return {
        "of_fast": float(counted[~slow].mean()),
        "of_slow": float(counted[slow].mean()),
        "least": float(counted.min()),
        "most": float(counted.max()),
        "accuracy_of_fast": float(hits[~test_slow].mean()),
        "accuracy_of_slow": float(hits[test_slow].mean()),
        "by_class": {str(digit): float(counted[labels == digit].mean()) for digit in range(10)},
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """How often examples counted, and what x knows of their classes."""
    rows = [
        [
            run["way"],
            percent(*run["dropped"]),
            plus_minus(*run["of_fast"]),
            plus_minus(*run["of_slow"]),
            f"{run['least'][0]:.3g} to {run['most'][0]:.3g}",
            percent(*run["accuracy_of_fast"]),
            percent(*run["accuracy_of_slow"]),
        ]
        for run in found["runs"]
    ]
    heads = [
        "",
        "slow worker's pushes dropped",
        "an example of classes 0 to 7 counted",
        "of classes 8 and 9",
        "least and most often",
        "accuracy on 0 to 7",
        "on 8 and 9",
    ]
    return [
        Table(f"as many pushes as {found['passes']} passes have; classes 8 and 9 are the slow worker's", heads, rows)
    ]


def draw(found: dict[str, Any], folder: Path) -> None:
    title = "How often an example counts, by its class: 8 and 9 are the slow worker's"
    with plot(folder / "units.png", title, "class", "times") as axes:
        width = 0.8 / len(found["runs"])
        for number, (run, colour) in enumerate(zip(found["runs"], COLOURS, strict=False)):
            places = [digit - 0.4 + width * (number + 0.5) for digit in range(10)]
            axes.bar(places, [average for average, _ in run["by_class"]], width, color=colour, label=run["way"])
        axes.set_xticks(range(10))
        axes.legend()
