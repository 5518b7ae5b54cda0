"""The square of a gradient's 2-norm, which also says whether all of it is finite: one pass over memory, or on a GPU a
few, beside its arrival there.

Squares of fp32 numbers are summed in fp64, where no number of them overflows: the sum is finite if they are. It costs
nothing beside reading them, and the sums of a vector's parts make up that of the whole to far below fp32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import compiled, inlined, is_compiled
from freestep_service.optimizers.kernels.halves import of_bf16_bits, of_f16_bits
from freestep_service.optimizers.kernels.slices import in_slices

__all__ = ["dequantize", "square_sum", "widen"]

CHUNK = 4096
"""Elements that are widened and measured while the processor has them at hand."""
PIECE = 4 * 1024 * 1024
"""Elements that cross to a GPU at a time; what that makes of them besides are vectors of so many."""


def _square_sum(vector: Any) -> Any:
    total = 0.0
    for i in range(vector.size):
        x = np.float64(vector[i])
        total += x * x
    return total


_squares = compiled(_square_sum, reassociate=True)


def _square_sum_of(whole: Callable[[Any], Any]) -> Callable[[Any], float]:
    whole = inlined(whole)

    def loop(halves: Any) -> Any:
        total = 0.0
        for i in range(halves.size):
            x = np.float64(whole(halves[i]))
            total += x * x
        return total

    return compiled(loop, f"squares.{whole.__name__}", reassociate=True)


def _widening(whole: Callable[[Any], Any]) -> Callable[[Any, Any], float]:
    whole = inlined(whole)

    def loop(halves: Any, vector: Any) -> Any:
        total = 0.0
        some = np.empty(min(CHUNK, halves.size), np.uint16)
        for begin in range(0, halves.size, CHUNK):
            part, place = halves[begin : begin + CHUNK], vector[begin : begin + CHUNK]
            # A copy, since the place may lie over them. Assigning the slice would keep the loops from being vectorised.
            for i in range(part.size):
                some[i] = part[i]
            for i in range(place.size):
                place[i] = whole(some[i])
            total += _squares(place)
        return total

    return compiled(loop, whole.__name__)


_WIDENING = {torch.bfloat16: _widening(of_bf16_bits), torch.float16: _widening(of_f16_bits)}


_SQUARES = {
    torch.float32: _squares,
    torch.bfloat16: _square_sum_of(of_bf16_bits),
    torch.float16: _square_sum_of(of_f16_bits),
}


def square_sum(vector: Tensor) -> float:
    """Σ x² of a flat vector on the host, fp32, BF16 or F16, in fp64; not finite where an element is not."""
    squares = _SQUARES[vector.dtype]
    elements = (vector if vector.dtype == torch.float32 else vector.view(torch.uint16)).numpy()
    return sum(in_slices(lambda begin, end: float(squares(elements[begin:end])), elements.size))


def widen(narrow: Tensor, out: Tensor) -> float | Tensor:
    """Writes BF16 or F16 numbers, flat [numel], into `out`, fp32 [numel], and returns Σ x² as `square_sum` does.

    `narrow` may be the second half of the memory of `out`: widening from the front never overtakes what is yet to be
    read. That is why it is one thread's.

    `out` may be on a GPU; then `narrow`, which may be fp32 too, has to stay until that has done what it was asked, and
    the sum is a tensor there, of fp64.
    """
    if not is_compiled(out):
        return _carry(lambda part: narrow[part].to(out.device, non_blocking=True), out)
    return float(_WIDENING[narrow.dtype](narrow.view(torch.uint16).numpy(), out.numpy()))


def dequantize(quanta: Tensor, scales: Tensor, block: int, out: Tensor) -> Tensor:
    """Writes q · scale, of int8 q [numel] and an fp32 scale for each `block` of them, into `out`, fp32 on a GPU.

    Returns Σ x², and takes what is on the host, as `widen` does. On the host it stays int8, see `Quantized`.
    """
    steps = scales.to(out.device, non_blocking=True)

    def values(part: slice) -> Tensor:
        blocks = torch.arange(part.start, part.stop, device=out.device) // block
        return quanta[part].to(out.device, non_blocking=True).float() * steps[blocks]

    return _carry(values, out)


def _carry(values: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """Fills `out`, fp32 on a GPU, with what `values` makes of its parts there, and returns Σ x²."""
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for begin in range(0, out.numel(), PIECE):
        part = slice(begin, min(begin + PIECE, out.numel()))
        # Widened here: a copy between devices would do it on the host.
        place = out[part].copy_(values(part))
        total += torch.linalg.vector_norm(place, dtype=torch.float64).square()
    return total
