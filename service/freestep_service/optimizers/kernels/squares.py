"""The square of a gradient's 2-norm, and the conversion of a body to fp32: one pass over memory, or a few on a GPU.

Squares of fp32 numbers are summed in fp64, where no such sum overflows: it is finite if and only if all elements are.
That costs nothing beside reading them, and the sums of a vector's parts add up to that of the whole far more exactly
than fp32 rounds.
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
"""Elements that are converted and summed up while they are in the processor's cache."""
PIECE = 4 * 1024 * 1024
"""Elements that are copied to a GPU at a time; temporary vectors there are of this size."""


def _square_sum(vector: Any) -> Any:
    total = 0.0
    for i in range(vector.size):
        x = np.float64(vector[i])
        total += x * x
    return total


_squares = compiled(_square_sum, reassociate=True)


def _square_sum_of(widened: Callable[[Any], Any]) -> Callable[[Any], float]:
    widened = inlined(widened)

    def loop(halves: Any) -> Any:
        total = 0.0
        for i in range(halves.size):
            x = np.float64(widened(halves[i]))
            total += x * x
        return total

    return compiled(loop, f"squares.{widened.__name__}", reassociate=True)


def _widening(widened: Callable[[Any], Any]) -> Callable[[Any, Any], float]:
    widened = inlined(widened)

    def loop(halves: Any, vector: Any) -> Any:
        total = 0.0
        copy = np.empty(min(CHUNK, halves.size), np.uint16)
        for begin in range(0, halves.size, CHUNK):
            part, place = halves[begin : begin + CHUNK], vector[begin : begin + CHUNK]
            # The place may overlap the part. Assigning a slice would keep the loops from being vectorized.
            for i in range(part.size):
                copy[i] = part[i]
            for i in range(place.size):
                place[i] = widened(copy[i])
            total += _squares(place)
        return total

    return compiled(loop, widened.__name__)


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
    """Converts BF16 or F16, flat [numel], to fp32 in `out` [numel]; returns Σ x² as `square_sum` does.

    `narrow` may be the second half of the memory of `out`: writing from the front never overtakes what is still to be
    read, as one thread does all of it.

    `out` may be on a GPU. Then `narrow`, which may also be fp32, must not change until the GPU has finished, and the
    sum is a tensor [] there, fp64.
    """
    if not is_compiled(out):
        return _fill(lambda part: narrow[part].to(out.device, non_blocking=True), out)
    return float(_WIDENING[narrow.dtype](narrow.view(torch.uint16).numpy(), out.numpy()))


def dequantize(quanta: Tensor, scales: Tensor, block: int, out: Tensor) -> Tensor:
    """Decodes int8 quanta [numel], with an fp32 scale for each `block` of them, to fp32 in `out` [numel] on a GPU.

    Returns Σ x² as `widen` does, and like it needs its arguments until the GPU has finished. On the host, int8 is not
    decoded beforehand (`Quantized`).
    """
    scales = scales.to(out.device, non_blocking=True)

    def values(part: slice) -> Tensor:
        blocks = torch.arange(part.start, part.stop, dtype=torch.int64, device=out.device) // block
        return quanta[part].to(out.device, non_blocking=True).float() * scales[blocks]

    return _fill(values, out)


def _fill(values: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """Writes `values(part)` to all parts of `out`, fp32 on a GPU; returns Σ x², fp64 []."""
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for begin in range(0, out.numel(), PIECE):
        part = slice(begin, min(begin + PIECE, out.numel()))
        # Converted on the GPU: a copy from the host would convert there.
        place = out[part].copy_(values(part))
        total += torch.linalg.vector_norm(place, dtype=torch.float64).square()
    return total
