"""A small LightningModule, and Trainers for it, that print nothing and leave nothing outside of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import schedulefree
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from freestep.integrations.lightning import FreestepCallback
from trained import network

__all__ = [
    "QUIET",
    "SMOOTHING",
    "WITH_ITS_WARNINGS",
    "Make",
    "Module",
    "batches",
    "by_the_package",
    "loader",
    "samples",
    "trainer",
    "weights",
]

WITH_ITS_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Of torch's deprecations, which Lightning meets.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # Advice.
        "Checkpoint directory .* exists and is not empty",
        "The '(train|val|test|predict)_dataloader' does not have many workers",
        "You defined a `validation_step` but have no `val_dataloader`",
    )
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SAMPLES = 64
SMOOTHING = 0.1
"""The weight of the newest loss in the average that a run's status shows."""


def samples() -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))


def batches(size: int = 8) -> Iterable[Tensor]:
    """What `loader` gives."""
    return samples().split(size)


def loader(size: int = 8, **options: Any) -> DataLoader[Tensor]:
    """Batches of the samples, in order."""
    return DataLoader(samples(), batch_size=size, **options)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A Trainer with a FreestepCallback and others."""
    given = {**QUIET, "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks), "max_epochs": 1}
    return Trainer(default_root_dir=folder, callbacks=[FreestepCallback(), *callbacks], **{**given, **options})


class Module(LightningModule):
    """The network of `trained`; `stages` are the points that its steps have seen, by stage."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], seed: int = 0) -> None:
        super().__init__()
        self.net = network(seed)
        self.stages: dict[str, list[str]] = {}
        self._make = make

    def configure_optimizers(self) -> Optimizer:
        return self._make(self)

    def see(self, stage: str) -> None:
        optimizers = self.optimizers()
        for each in optimizers if isinstance(optimizers, list) else [optimizers]:
            self.stages.setdefault(stage, []).append(each.loaded.point)

    def loss(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.net(inputs).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.see("train")
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.see("validate")
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        predicted: Tensor = self.net(batch)
        return predicted


Make: TypeAlias = Callable[..., Module]


def by_the_package(
    epochs: int = 1, *, size: int = 8, together: int = 1, clip: float | None = None, skip: int = 0
) -> tuple[nn.Module, list[float]]:
    """The model at x after these epochs over the samples but the first batches, and the loss of every step."""
    model = network()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.0025)
    optimizer.train()
    losses = []
    given = list(batches(size))
    groups = [given[begin : begin + together] for begin in range(0, len(given), together)] * epochs
    for group in groups[skip:]:
        optimizer.zero_grad()
        values = [model(inputs).square().mean() for inputs in group]
        for value in values:
            (value / together).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(torch.stack(values).mean().item())
    optimizer.eval()
    return model, losses


def weights(checkpoint: str | Path) -> Tensor:
    """Those of a checkpoint, as `trained.held` gives a model's."""
    loaded: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return torch.cat([each.reshape(-1) for each in loaded.values()])
