"""What counts the pushes that were applied while others travelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from freestep import Receipt, RemoteOptimizer


class Counting(nn.Module):
    """Parameters from 0 whose every gradient is -1: at a run of plain SGD they count the pushes that were applied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(30))

    def push(self, optimizer: RemoteOptimizer, value: float = -1.0, **options: Any) -> None:
        self.count.grad = torch.full_like(self.count, value)
        optimizer.step(**{"overlap": True, **options})

    @property
    def counted(self) -> int:
        assert (self.count == self.count[0]).all()
        return int(self.count[0].item())


def what(receipt: Receipt | None) -> tuple[str, str | None, int, int] | None:
    return None if receipt is None else (receipt.decision, receipt.reason, receipt.step, receipt.staleness)
