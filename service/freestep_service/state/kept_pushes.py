"""The pushes of an update that a robust rule compares, kept apart until the update is made.

The law of this file: no IO, no clock, no lock. What comes out is a function of the pushes, in the order of the log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from freestep.api.models import AggregationSpec
from freestep_service.optimizers import Gradient, Pushed, gather, square_distances, trimmed_mean
from freestep_service.state.compute import HOST

__all__ = ["KeptPushes", "least_scores", "trimmed_values"]

_ALIGNMENT = 4
"""Elements."""
_ROUNDING = 1e-9
"""What fp64 may add to β · n."""


class KeptPushes:
    """Room for the pushes of one update, fp32 [most, numel]; of those that are not used no memory is touched."""

    def __init__(self, spec: AggregationSpec, most: int, numel: int, device: torch.device) -> None:
        self._spec = spec
        self._numel = numel
        # On a GPU kernels are compiled for vectors that begin at multiples of 16 bytes.
        width = numel if device == HOST else -(-numel // _ALIGNMENT) * _ALIGNMENT
        self._rows = torch.empty(most, width, dtype=torch.float32, device=device)
        self._rows[:, numel:] = 0.0
        self._count = 0

    def add(self, pushed: Pushed, scale: float) -> None:
        """Keeps `scale * pushed`, flat [numel]."""
        gather(self._rows[self._count, : self._numel], pushed, scale, first=True)
        self._count += 1

    def square_distances(self, pushed: Pushed | None, scale: float) -> Tensor:
        """Those between what is kept and `scale * pushed`, if that is another; it is not kept by this."""
        count = self._count
        if pushed is not None:
            gather(self._rows[count, : self._numel], pushed, scale, first=True)
            count += 1
        return square_distances(self._rows[:count])

    def combine(self, distances: Tensor | None = None) -> Gradient:
        """The gradient that the rule makes of what is kept; the next push to be kept is the first of another update.

        distances: as `square_distances` has them, where what is kept is a part of the pushes only.
        """
        rows, self._count = self._rows[: self._count], 0
        match self._spec.robust:
            case "trimmed_mean":
                assert self._spec.beta is not None
                return Gradient(trimmed_mean(rows, trimmed_values(self._spec.beta, len(rows)))[: self._numel])
            case "coordinate_median":
                return Gradient(trimmed_mean(rows, (len(rows) - 1) // 2)[: self._numel])
        assert self._spec.f is not None, "the rule compares pushes"
        distances = square_distances(rows) if distances is None else distances
        first, *others = least_scores(distances, len(rows), self._spec.f, self._spec.m or 1)
        total = rows[first, : self._numel]
        for other in others:
            gather(total, rows[other, : self._numel], 1.0, first=False)
        return Gradient(total, 1 / (1 + len(others)))

    def tensors(self) -> list[Tensor]:
        """What is kept, in order, flat [numel] each."""
        return list(self._rows[: self._count, : self._numel])

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Keeps these, as `tensors` gave them."""
        for row, tensor in zip(self._rows, tensors, strict=False):
            row[: self._numel].copy_(tensor)
        self._count = len(tensors)


def trimmed_values(beta: float, count: int) -> int:
    """How many of `count` values are trimmed at each end: β · count, rounded up, as far as values are left."""
    return min(math.ceil(beta * count - _ROUNDING), (count - 1) // 2)


def least_scores(distances: Tensor, count: int, f: int, m: int) -> list[int]:
    """The `m` of `count` rows with the least scores, at least one and in their order; of equal ones the first.

    distances: squared, as `square_distances` has them. A row's score is the sum of those to its count - f - 2 nearest
    (arXiv 1703.02757). Of fewer than f + 3 rows, one neighbour counts.
    """
    matrix = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    one, other = torch.triu_indices(count, count, 1, dtype=torch.int64, device="cpu")
    matrix[one, other] = matrix[other, one] = distances
    neighbours = min(max(count - f - 2, 1), count - 1)
    others = matrix.sort(dim=1).values[:, 1 : 1 + neighbours]
    scores = others.sum(dim=1).tolist()
    best = sorted(range(count), key=lambda row: (scores[row], row))
    return sorted(best[: max(min(m, count - f), 1)])
