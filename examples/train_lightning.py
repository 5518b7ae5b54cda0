"""A worker in Lightning: start `freestep serve`, and then this as often as you like.

    python examples/train_lightning.py

needs the `demo` extra, for its 5,000 digits, and lightning.
"""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet
from freestep.integrations.lightning import FreestepCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallConvNet()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # process_group="auto": with several devices, their processes are one worker.
        return freestep.RemoteOptimizer(self.net, run="lightning", lr=2.5e-3, process_group="auto")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.net(inputs), targets)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        accuracy = (self.net(inputs).argmax(1) == targets).float().mean()
        self.log("accuracy", accuracy, batch_size=len(inputs), sync_dist=True)

    def on_validation_end(self) -> None:
        self.print(f"x has {self.trainer.callback_metrics['accuracy']:.1%} test accuracy")


torch.set_num_threads(1)
digits = load()
training = TensorDataset(digits.train_images, digits.train_labels)
test = TensorDataset(digits.test_images, digits.test_labels)
quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
trainer = Trainer(max_epochs=3, callbacks=[FreestepCallback()], **quiet)  # which validates and saves x, and trains at y
trainer.fit(Digits(), DataLoader(training, batch_size=32, shuffle=True), DataLoader(test, batch_size=500))
