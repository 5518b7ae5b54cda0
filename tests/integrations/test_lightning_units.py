"""Lightning on units of data: weights count which examples moved them, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from freestep import LocalSteps, RemoteOptimizer, Run, Units
from harness import ThreadService
from lightning_module import WITH_ITS_WARNINGS, trainer

pytestmark = WITH_ITS_WARNINGS

LENGTH, UNIT = 50, 5
Make = Callable[..., "Counts"]


class Counts(LightningModule):
    """A parameter for each example of each data set, which each step that is taken on it makes larger by 1."""

    def __init__(self, make: Callable[[nn.Module], RemoteOptimizer], *names: str, **options: Any) -> None:
        super().__init__()
        self.names, self.options = names or ("train",), options
        self.counts = nn.ParameterList([nn.Parameter(torch.zeros(LENGTH)) for _ in self.names])
        self._make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make(self)

    def train_dataloader(self) -> Any:
        optimizer: Any = self.optimizers()
        workers = self.options.pop("workers", 0)
        loaders = {
            name: Units(optimizer, LENGTH, unit=UNIT, name=name, **self.options).loader(
                range(LENGTH), batch_size=UNIT, num_workers=workers
            )
            for name in self.names
        }
        return CombinedLoader(loaders, "max_size") if len(loaders) > 1 else loaders[self.names[0]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch if isinstance(batch, dict) else {self.names[0]: batch}
        counts = dict(zip(self.names, self.counts, strict=True))
        sums = [-counts[name][part].sum() for name, part in parts.items() if part is not None]
        # Which Lightning divides by this.
        return torch.stack(sums).sum() * self.trainer.accumulate_grad_batches


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Make]:
    """Makes modules whose optimizers work on one run; these are closed with the test."""
    made: list[RemoteOptimizer] = []

    def module(*names: str, every: int = 0, **options: Any) -> Counts:
        def optimizer(model: nn.Module) -> RemoteOptimizer:
            given: dict[str, Any] = {"url": service.url, "run": name, "aggregation": "async", "lr": 1.0}
            if every:
                inner = torch.optim.SGD(model.parameters(), lr=1.0)
                made.append(LocalSteps(model, inner, every=every, momentum=0.0, **given))
            else:
                made.append(RemoteOptimizer(model, algorithm="sgd", **given))
            return made[-1]

        return Counts(optimizer, *names, **options)

    yield module
    for each in made:
        each.close()


def counted(run: Run) -> set[float]:
    return {value for each in run.pull("y")[0].values() for value in each.tolist()}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_counts_once_a_pass(make: Make, run: Run, tmp_path: Path, workers: int) -> None:
    its = trainer(tmp_path, max_epochs=-1)
    its.fit(make(passes=2, workers=workers))
    assert counted(run) == {2.0} and run.data().status().exhausted and run.status().step == 20
    assert its.current_epoch == 1


@pytest.mark.parametrize("together", [3, 4])
def test_accumulated_gradients_go_with_all_their_units(make: Make, run: Run, tmp_path: Path, together: int) -> None:
    trainer(tmp_path, max_epochs=-1, accumulate_grad_batches=together).fit(make())
    assert counted(run) == {1.0} and run.status().step == -(-10 // together)


class Steps(Callback):
    """Compares what has counted with the steps that were taken."""

    def __init__(self, run: Run) -> None:
        self.seen = 0
        self._run = run

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        assert self._run.data().status().done == self._run.status().step == self.seen


def test_a_unit_counts_with_the_step_that_was_taken_on_it(make: Make, run: Run, tmp_path: Path) -> None:
    steps = Steps(run)
    trainer(tmp_path, steps, max_epochs=-1).fit(make())
    assert steps.seen == 10


def test_rounds_of_local_steps_push_their_units(make: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=-1).fit(make(every=4))
    assert counted(run) == {1.0} and run.status().step == 3


def test_a_fit_that_is_stopped_leaves_the_rest_to_others(make: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=-1, max_steps=4).fit(make())
    assert run.data().status().done == 4 and run.data().status().out == 0
    trainer(tmp_path, max_epochs=-1).fit(make())
    assert counted(run) == {1.0}


def test_a_fit_that_is_resumed_goes_on_with_what_is_left(make: Make, run: Run, tmp_path: Path) -> None:
    first, second = (ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1) for _ in range(2))
    trainer(tmp_path, first, max_epochs=-1, max_steps=4).fit(make())
    assert run.data().status().done == 4
    trainer(tmp_path, second, max_epochs=-1).fit(make(), ckpt_path=tmp_path / "step=3.ckpt")
    assert counted(run) == {1.0} and run.status().step == 10


def test_two_data_sets_count_together(make: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=-1).fit(make("one", "other"))
    assert counted(run) == {1.0} and run.status().step == 10
    assert [(each.name, each.exhausted) for each in run.data_sets()] == [("one", True), ("other", True)]
