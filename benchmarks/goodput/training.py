"""What is trained: the demo's model on its digits, by freestep's workers and by DDP's alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

__all__ = ["BATCH", "LR", "batches", "model"]

BATCH, LR = 32, 2.5e-3


def model() -> SmallConvNet:
    """The same initial weights in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return SmallConvNet()


def batches(data: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and digits without end, in an order of the process's own."""
    digits, generator = load(data), torch.Generator()
    generator.seed()
    while True:
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for indices in torch.split(order, BATCH):
            yield digits.train_images[indices], digits.train_labels[indices]
