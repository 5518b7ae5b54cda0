"""A worker in Lightning on data that counts once: start `freestep serve`, and then this as often as you like.

    python examples/lightning_units.py

needs the `demo` extra, for its 5,000 digits, and lightning. All of them together train on each digit three times,
whichever you kill.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet
from freestep.integrations.lightning import FreestepCallback

torch.set_num_threads(1)
digits = load()
training = TensorDataset(digits.train_images, digits.train_labels)
test = TensorDataset(digits.test_images, digits.test_labels)


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallConvNet()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return freestep.RemoteOptimizer(self.net, run="lightning-units", lr=2.5e-3)

    def train_dataloader(self) -> Any:
        # Lightning has called configure_optimizers before.
        units = freestep.Units(self.optimizers(), len(training), unit=32, passes=3)
        return units.loader(training, batch_size=32)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.net(inputs), targets)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == targets).float().mean(), batch_size=len(inputs))


quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = Trainer(max_epochs=-1, callbacks=[FreestepCallback()], **quiet)  # until all units have counted
module = Digits()
trainer.fit(module)
accuracy = trainer.test(module, DataLoader(test, batch_size=500), verbose=False)[0]["accuracy"]
print(f"x has {accuracy:.1%} test accuracy after {trainer.global_step} steps of this worker")
