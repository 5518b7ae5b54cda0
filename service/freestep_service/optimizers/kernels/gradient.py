"""What a step is taken along: a push, or the mean of a group whose last push has not been gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import inlined
from freestep_service.optimizers.kernels.halves import of_bf16_bits, of_f16_bits
from freestep_service.optimizers.kernels.quantized import Quantized

__all__ = ["PIECE", "Gradient", "Pushed", "element"]

PIECE = 128 * 1024
"""Elements that are made of int8 at a time: few enough to stay in the processor's cache."""

Pushed = Tensor | Quantized
"""A push's gradient, flat [numel], as it came: fp32, BF16 or F16, or int8 with scales."""


def _same(g: Any) -> Any:
    return g


_WIDENING: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.float32: _same,
    torch.bfloat16: of_bf16_bits,
    torch.float16: of_f16_bits,
}
"""What compiled loops make fp32 of an element with, as it came; halves are given as their bits."""


class Gradient(NamedTuple):
    """`scale · (gathered + share · pushed)`: that of one push, or the mean of a group's, whose last one it is.

    gathered: fp32; None where nothing was gathered before. scale and share: numbers, which a kernel takes as
    tensors [].
    """

    pushed: Pushed
    scale: float | Tensor = 1.0
    share: float | Tensor = 1.0
    gathered: Tensor | None = None

    def part(self, part: slice) -> Gradient:
        """That of some elements; what came as int8 is fp32 then."""
        gathered = None if self.gathered is None else self.gathered[part]
        if isinstance(self.pushed, Quantized):
            begin, end, _ = part.indices(self.pushed.numel())
            return self._replace(pushed=self.pushed.decoded(begin, end, torch.empty(end - begin)), gathered=gathered)
        return self._replace(pushed=self.pushed[part], gathered=gathered)

    def evaluated(self, dtype: torch.dtype) -> Tensor:
        """The gradient itself, by torch."""
        pushed = self.pushed
        if isinstance(pushed, Quantized):
            pushed = pushed.decoded(0, pushed.numel(), torch.empty(pushed.numel()))
        g = self.share * pushed.to(dtype)
        return self.scale * (g if self.gathered is None else self.gathered + g)

    @property
    def dtype(self) -> torch.dtype:
        """What `pieces` are of."""
        return torch.float32 if isinstance(self.pushed, Quantized) else self.pushed.dtype

    def pieces(self, begin: int, end: int) -> Iterator[tuple[slice, Any, Any]]:
        """Elements `begin` to `end` for compiled loops, a stretch after another: where it lies, what was pushed there,
        and what was gathered.

        Halves are given as their bits. What came as int8 is fp32, in stretches of at most PIECE elements, until the
        next one is asked for. Where nothing was gathered, what stands in its place is not to be read.
        """
        gathered = None if self.gathered is None else self.gathered.numpy()
        for part, pushed in self._pushed(begin, end):
            yield part, pushed, pushed if gathered is None else gathered[part]

    def _pushed(self, begin: int, end: int) -> Iterator[tuple[slice, Any]]:
        if not isinstance(self.pushed, Quantized):
            part = slice(begin, end)
            came = self.pushed if self.pushed.dtype == torch.float32 else self.pushed.view(torch.uint16)
            yield part, came.numpy()[part]
            return
        some = torch.empty(min(PIECE, end - begin))
        for at in range(begin, end, PIECE):
            part = slice(at, min(at + PIECE, end))
            yield part, self.pushed.decoded(part.start, part.stop, some).numpy()


@cache
def element(dtype: torch.dtype, *, gathered: bool) -> Callable[[Any, Any, Any, Any], Any]:
    """What compiled loops make an element of a Gradient with, fp32: a function of scale, share, and of the elements of
    `pieces`, where those are of `dtype`."""
    widened = inlined(_WIDENING[dtype])

    def alone(scale: Any, share: Any, pushed: Any, _: Any) -> Any:
        return scale * (share * widened(pushed))

    def mean(scale: Any, share: Any, pushed: Any, gathered: Any) -> Any:
        return scale * (gathered + share * widened(pushed))

    return inlined(mean if gathered else alone)
