"""What the workers of these tests learn: of random points, which of four directions is theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["INPUTS", "LABELS", "accuracy", "new_model"]

_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(4000, 20, generator=_random)
LABELS = (INPUTS @ torch.randn(20, 4, generator=_random)).argmax(1)


def new_model() -> nn.Module:
    """The same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))


def accuracy(weights: Mapping[str, Tensor]) -> float:
    """The share of points that a model with these weights puts where they belong."""
    model = new_model()
    model.load_state_dict(dict(weights))
    with torch.no_grad():
        return float((model(INPUTS).argmax(1) == LABELS).float().mean())
