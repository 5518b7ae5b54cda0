"""What a step is taken along: a push, or the mean of a group whose last push has not been gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freestep_service.optimizers.halves import of_bf16_bits, of_f16_bits

__all__ = ["WIDENING", "Gradient"]


def _same(g: Any) -> Any:
    return g


WIDENING: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.float32: _same,
    torch.bfloat16: of_bf16_bits,
    torch.float16: of_f16_bits,
}
"""What compiled loops make fp32 of an element with, as it came; halves are given as their bits."""


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
