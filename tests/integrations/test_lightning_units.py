"""Lightning on units of data: weights count which examples moved them, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from freestep import FreestepError, LocalSteps, RemoteOptimizer, Run, Units
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

    def module(*names: str, kind: type[Counts] = Counts, every: int = 0, **options: Any) -> Counts:
        def optimizer(model: nn.Module) -> RemoteOptimizer:
            given: dict[str, Any] = {"url": service.url, "run": name, "aggregation": "async", "lr": 1.0}
            if every:
                inner = torch.optim.SGD(model.parameters(), lr=1.0)
                made.append(LocalSteps(model, inner, every=every, momentum=0.0, **given))
            else:
                made.append(RemoteOptimizer(model, algorithm="sgd", **given))
            return made[-1]

        return kind(optimizer, *names, **options)

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


LIMITS = [
    {"limit_train_batches": 3},
    {"limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1},
    {"limit_train_batches": 3, "accumulate_grad_batches": 2},
    {"limit_train_batches": 1},
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_epochs_of_some_batches_count_every_example_once(
    make: Make, run: Run, tmp_path: Path, limits: dict[str, Any], workers: int
) -> None:
    """Lightning takes no batch before it needs it where it knows the epoch's length."""
    module = make(workers=workers)
    steps = [] if "accumulate_grad_batches" in limits else [Steps(run)]
    trainer(tmp_path, *steps, max_epochs=-1, **limits).fit(module)
    assert counted(run) == {1.0} and run.data().status().exhausted


def test_one_batch_to_try_it_counts_its_unit(make: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True).fit(make())
    status = run.data().status()
    assert (status.done, status.out) == (1, 0) and sum(run.pull("y")[0]["counts.0"].tolist()) == UNIT


class Overflowing(Counts):
    """Its first gradients are infinite."""

    def on_after_backward(self) -> None:
        if self.trainer.current_epoch < 2:
            self.counts[0].grad.fill_(torch.inf)  # type: ignore[union-attr]


def test_a_step_that_a_scaler_skips_at_an_epochs_end_gives_its_units_back(make: Make, run: Run, tmp_path: Path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer(tmp_path, plugins=precision, max_epochs=-1, limit_train_batches=1).fit(make(kind=Overflowing))
    assert counted(run) == {1.0} and run.status().step == 10


def none_of_every_second(examples: list[int]) -> Tensor | None:
    return None if examples[0] % (2 * UNIT) else torch.tensor(examples)


class Gaps(Counts):
    """Its loader makes nothing of every second unit, as one that leaves out what cannot be read."""

    def train_dataloader(self) -> Any:
        units = Units(self.optimizers(), LENGTH, unit=UNIT, shuffle="none")  # type: ignore[arg-type]
        return units.loader(range(LENGTH), batch_size=UNIT, collate_fn=none_of_every_second)


class ByHand(Counts):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_batches_that_are_none_count_with_the_next_step(make: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=1).fit(make(kind=Gaps))
    # The last one has no step that follows.
    assert run.status().step == 5 and run.data().status().done == 9
    assert counted(run) == {0.0, 1.0}


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument", "ignore:You are using the `dataloader_iter`")
def test_a_module_that_takes_its_batches_itself_counts_each_unit_with_its_step(
    make: Make, run: Run, tmp_path: Path
) -> None:
    trainer(tmp_path, Steps(run), max_epochs=-1).fit(make(kind=ByHand))
    assert counted(run) == {1.0}


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


class Cycling(Counts):
    """Leaves it to Lightning how loaders are combined."""

    def train_dataloader(self) -> Any:
        return super().train_dataloader().iterables


class Bare(Counts):
    """Has no loader."""

    def train_dataloader(self) -> Any:
        return Units(self.optimizers(), LENGTH, unit=UNIT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "names", "said"), [(Cycling, ("one", "other"), "max_size"), (Bare, (), "units.loader")], ids=str
)
def test_what_would_not_count_every_example_is_refused(
    make: Make, run: Run, tmp_path: Path, kind: type[Counts], names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(FreestepError, match=said):
        trainer(tmp_path).fit(make(*names, kind=kind))
    assert run.status().step == 0
