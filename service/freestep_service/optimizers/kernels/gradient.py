"""The gradient of a step: that of one push, or the mean of a group of pushes, whose last one is added on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import inlined
from freestep_service.optimizers.kernels.halves import of_bf16_bits, of_f16_bits
from freestep_service.optimizers.kernels.quantized import Quantized

__all__ = ["PIECE", "Gradient", "Pushed", "element_function"]

PIECE = 128 * 1024
"""Elements of int8 that are decoded at a time: few enough to stay in the processor's cache."""

Pushed = Tensor | Quantized
"""A push's gradient, flat [numel], as it was received: fp32, BF16 or F16, or int8 with scales."""


def _identity(g: Any) -> Any:
    return g


_WIDENING: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.float32: _identity,
    torch.bfloat16: of_bf16_bits,
    torch.float16: of_f16_bits,
}
"""How compiled loops convert an element to fp32; BF16 and F16 are given as their bits, uint16."""


class Gradient(NamedTuple):
    """scale · (gathered + share · pushed), flat [numel].

    gathered: the weighted sum of the group's earlier pushes, fp32; None where there are none. scale, share: numbers; in
    a kernel they are tensors [].
    """

    pushed: Pushed
    scale: float | Tensor = 1.0
    share: float | Tensor = 1.0
    gathered: Tensor | None = None

    def part(self, part: slice) -> Gradient:
        """The gradient of some elements, with int8 decoded to fp32."""
        gathered = None if self.gathered is None else self.gathered[part]
        if isinstance(self.pushed, Quantized):
            begin, end, _ = part.indices(self.pushed.numel())
            return self._replace(pushed=self.pushed.decoded(begin, end, _empty(end - begin)), gathered=gathered)
        return self._replace(pushed=self.pushed[part], gathered=gathered)

    def evaluated(self, dtype: torch.dtype) -> Tensor:
        """The gradient as a tensor [numel] of a dtype, computed by torch."""
        pushed = self.pushed
        if isinstance(pushed, Quantized):
            pushed = pushed.decoded(0, pushed.numel(), _empty(pushed.numel()))
        g = self.share * pushed.to(dtype)
        return self.scale * (g if self.gathered is None else self.gathered + g)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `pieces`."""
        return torch.float32 if isinstance(self.pushed, Quantized) else self.pushed.dtype

    def pieces(self, begin: int, end: int) -> Iterator[tuple[slice, Any, Any]]:
        """Elements `begin` to `end` for compiled loops, in pieces: (their place, what was pushed, what was gathered).

        BF16 and F16 are given as their bits, uint16. Of int8, a piece is at most PIECE elements, fp32, valid until the
        next piece. Where nothing was gathered, the third array is a placeholder that is not to be read.
        """
        gathered = None if self.gathered is None else self.gathered.numpy()
        for part, pushed in self._pushed_pieces(begin, end):
            yield part, pushed, pushed if gathered is None else gathered[part]

    def _pushed_pieces(self, begin: int, end: int) -> Iterator[tuple[slice, Any]]:
        if not isinstance(self.pushed, Quantized):
            part = slice(begin, end)
            elements = self.pushed if self.pushed.dtype == torch.float32 else self.pushed.view(torch.uint16)
            yield part, elements.numpy()[part]
            return
        decoded = _empty(min(PIECE, end - begin))
        for first in range(begin, end, PIECE):
            part = slice(first, min(first + PIECE, end))
            yield part, self.pushed.decoded(part.start, part.stop, decoded).numpy()


def _empty(numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device="cpu")


@cache
def element_function(dtype: torch.dtype, *, gathered: bool) -> Callable[[Any, Any, Any, Any], Any]:
    """(scale, share, pushed element, gathered element) -> the gradient's element, fp32, for compiled loops.

    dtype: that of `Gradient.pieces`.
    """
    widened = inlined(_WIDENING[dtype])

    def single(scale: Any, share: Any, pushed: Any, _: Any) -> Any:
        return scale * (share * widened(pushed))

    def mean(scale: Any, share: Any, pushed: Any, gathered: Any) -> Any:
        return scale * (gathered + share * widened(pushed))

    return inlined(mean if gathered else single)
