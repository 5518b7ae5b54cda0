"""Trainer on units of data: weights count which examples moved them, and how often."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from freestep import LocalSteps, RemoteOptimizer, Run, Units
from freestep.integrations.transformers import FreestepCallback, remote_optimizer
from harness import ThreadService

LENGTH, UNIT = 50, 5


class Counts(nn.Module):
    """A parameter for each example, which each step that is taken on it makes larger by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(LENGTH))

    def forward(self, index: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        # Not divided by the number of examples, which Trainer leaves to models that take keyword arguments.
        return {"loss": -self.count[index].sum()}


class Examples(Dataset[dict[str, Tensor]]):
    """Example i is i."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "labels": torch.tensor([0, 1])}


class OnUnits(Trainer):
    """A Trainer whose batches are units that the run hands out."""

    def __init__(self, *args: Any, passes: int = 1, workers: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = {"unit": UNIT, "passes": passes}
        self._workers = workers

    def get_train_dataloader(self) -> Any:
        units = Units(self.create_optimizer(), len(self.train_dataset), **self._options)  # type: ignore[arg-type]
        return units.loader(
            self.train_dataset, batch_size=UNIT, num_workers=self._workers, collate_fn=self.data_collator
        )


Make = Callable[..., OnUnits]


@pytest.fixture
def make(service: ThreadService, name: str, tmp_path: Path) -> Iterator[Make]:
    """Makes Trainers of the run; their optimizers are closed with the test."""
    made: list[OnUnits] = []

    def trainer(*callbacks: TrainerCallback, optimizer: Any = None, **changed: Any) -> OnUnits:
        own = {key: changed.pop(key) for key in ("passes", "workers") if key in changed}
        given = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 1000,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        args = TrainingArguments(**{**given, **changed})
        model = Counts()
        options = {"url": service.url, "run": name, "algorithm": "sgd", "lr": 1.0, "weight_decay": 0.0}
        of_run = remote_optimizer(args, **options, aggregation="async")
        how: dict[str, Any] = (
            {"optimizer_cls_and_kwargs": of_run} if optimizer is None else {"optimizers": (optimizer(model), None)}
        )
        made.append(
            OnUnits(model, args, train_dataset=Examples(), callbacks=[*callbacks, FreestepCallback()], **own, **how)
        )
        return made[-1]

    yield trainer
    for each in made:
        optimizer_of(each).close()


def optimizer_of(trainer: Trainer) -> RemoteOptimizer:
    found: RemoteOptimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # type: ignore[assignment]
    return found


def counted(run: Run) -> set[float]:
    return set(run.pull("y")[0]["count"].tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_counts_once_a_pass(make: Make, run: Run, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make(passes=2, workers=workers)
        trainer.train()
    assert counted(run) == {2.0} and run.data().status().exhausted
    assert trainer.state.global_step == run.status().step == 20
    assert "single sample" not in caplog.text


@pytest.mark.parametrize("steps", [3, 4])
def test_gradients_that_the_last_units_leave_are_pushed(make: Make, run: Run, steps: int) -> None:
    make(gradient_accumulation_steps=steps, max_grad_norm=1e9).train()
    assert counted(run) == {1.0} and run.data().status().exhausted
    assert run.status().step == -(-10 // steps)


def test_a_training_that_is_stopped_leaves_the_rest_to_others(make: Make, run: Run) -> None:
    make(max_steps=4).train()
    status = run.data().status()
    assert (status.done, status.out) == (4, 0)
    make().train()
    assert counted(run) == {1.0}


def test_a_training_that_is_resumed_goes_on_with_what_is_left(make: Make, run: Run, tmp_path: Path) -> None:
    make(max_steps=4, save_strategy="steps", save_steps=3).train()
    assert run.data().status().done == 4
    trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert counted(run) == {1.0} and trainer.state.global_step == 9
    trainer.train()
    assert counted(run) == {1.0}


class Stop(TrainerCallback):
    """Ends an epoch in the middle of an accumulation, once."""

    def __init__(self) -> None:
        self._stopped = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._stopped and state.global_step == 1:
            self._stopped = control.should_epoch_stop = True


def test_batches_that_were_taken_and_not_trained_on_are_given_back(make: Make, run: Run) -> None:
    make(Stop(), gradient_accumulation_steps=3).train()
    assert counted(run) == {1.0} and run.data().status().exhausted


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_that_a_scaler_skips_give_their_units_back(make: Make, run: Run, steps: int) -> None:
    trainer = make(gradient_accumulation_steps=steps)
    # As with fp16 on a GPU. It halves its scale with each step that it skips; Trainer takes norms of scaled gradients.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**66)
    trainer.train()
    assert counted(run) == {1.0} and run.data().status().exhausted
    assert run.status().step == -(-10 // steps) and trainer.accelerator.scaler.get_scale() < 2.0**64


def test_rounds_of_local_steps_push_their_units(make: Make, service: ThreadService, name: str, run: Run) -> None:
    def local(model: nn.Module) -> LocalSteps:
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        options: dict[str, Any] = {"aggregation": "async", "lr": 1.0, "momentum": 0.0}
        return LocalSteps(model, inner, every=4, url=service.url, run=name, **options)

    make(optimizer=local, gradient_accumulation_steps=1).train()
    assert counted(run) == {1.0} and run.status().step == 3
