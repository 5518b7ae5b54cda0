"""What a step is taken along: a push, or the mean of a group whose last push has not been gathered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Gradient"]


class Gradient(NamedTuple):
    """`scale · (gathered + share · pushed)`: that of one push, or the mean of a group's, whose last one it is.

    pushed: fp32, or BF16 or F16 as it came. gathered: fp32; None where nothing was gathered before. scale
    and share: numbers, which a kernel takes as tensors [].
    """

    pushed: Tensor
    scale: float | Tensor = 1.0
    share: float | Tensor = 1.0
    gathered: Tensor | None = None

    def part(self, part: slice) -> Gradient:
        """That of some elements."""
        gathered = None if self.gathered is None else self.gathered[part]
        return self._replace(pushed=self.pushed[part], gathered=gathered)

    def evaluated(self, dtype: torch.dtype) -> Tensor:
        """The gradient itself, by torch."""
        g = self.share * self.pushed.to(dtype)
        return self.scale * (g if self.gathered is None else self.gathered + g)
