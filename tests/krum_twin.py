"""Krum, read off the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["krum_twin"]


def krum_twin(pushes: Sequence[Tensor], f: int, m: int) -> Tensor:
    """Blanchard et al. (arXiv 1703.02757), section 4: Krum, and Multi-Krum of the m best."""
    count = len(pushes)
    neighbours = max(count - f - 2, 1)
    scores = []
    for i in range(count):
        distances = sorted(float((pushes[i] - pushes[j]).square().sum()) for j in range(count) if j != i)
        scores.append(sum(distances[:neighbours]))
    best = sorted(range(count), key=lambda i: scores[i])[: max(min(m, count - f), 1)]
    return torch.stack([pushes[i] for i in best]).mean(0)
