"""The demo's model."""

from __future__ import annotations

from torch import nn

__all__ = ["SmallConvNet"]


class SmallConvNet(nn.Sequential):
    """Two convolutions and two linear layers, 52,138 parameters: [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
