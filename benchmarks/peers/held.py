"""What every peer's server holds: the parameters, and the schedulefree package's AdamW for them."""

from __future__ import annotations

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

__all__ = ["Held"]


class Held:
    """Parameters, zeros at first, and their optimizer; foreach is no slower than its other setting."""

    def __init__(self, parameters: int) -> None:
        self._parameter = nn.Parameter(torch.zeros(parameters))
        self._optimizer = AdamWScheduleFree([self._parameter], foreach=True)
        self._optimizer.train()

    @property
    def y(self) -> Tensor:
        return self._parameter.detach()

    def step(self, gradient: Tensor) -> Tensor:
        """Applies a gradient, whose memory the optimizer overwrites, and returns y, which the next step changes."""
        self._parameter.grad = gradient
        self._optimizer.step()
        self._parameter.grad = None
        return self.y
