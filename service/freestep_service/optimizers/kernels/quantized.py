"""A gradient in int8, as it was received: an element is q · scale, with one scale for each block of elements.

It is decoded within the passes over memory that need it, a piece at a time, so its fp32 elements stay in the cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from freestep.wire.manifest import Slot
from freestep_service.optimizers.kernels.compiled import compiled
from freestep_service.optimizers.kernels.slices import in_slices

__all__ = ["Quantized"]


def _decode_loop(quanta: Any, scales: Any, first: Any, block: Any, out: Any) -> None:
    begin = 0
    while begin < out.size:
        number = (first + begin) // block
        end = min((number + 1) * block - first, out.size)
        scale, piece, place = scales[number], quanta[first + begin : first + end], out[begin:end]
        for i in range(place.size):
            place[i] = np.float32(piece[i]) * scale
        begin = end


def _square_sum_loop(quanta: Any, scales: Any, first: Any, last: Any, block: Any) -> Any:
    total = 0.0
    while first < last:
        number = first // block
        end = min((number + 1) * block, last)
        scale, piece, block_total = scales[number], quanta[first:end], 0.0
        for i in range(piece.size):
            x = np.float64(np.float32(piece[i]) * scale)
            block_total += x * x
        total += block_total
        first = end
    return total


_decode, _squares = compiled(_decode_loop), compiled(_square_sum_loop, reassociate=True)


class Quantized(NamedTuple):
    """A flat vector [numel] on the host, of the tensors in `slots`, in their order.

    quanta: of each slot, int8 [slot.numel]. scales: of each slot, fp32 [ceil(slot.numel / block)].
    """

    slots: Sequence[Slot]
    quanta: Sequence[Tensor]
    scales: Sequence[Tensor]
    block: int

    def numel(self) -> int:
        return self.slots[-1].offset + self.slots[-1].numel if self.slots else 0

    def decoded(self, begin: int, end: int, out: Tensor) -> Tensor:
        """Writes elements `begin` to `end` into the first elements of `out`, fp32, and returns these.

        `out` may be the memory in which the quanta lie, right-aligned in their slots: writing from the front never
        overtakes what is still to be read.
        """
        array = out.numpy()
        for number, first, last in self._places(begin, end):
            place = self.slots[number].offset + first - begin
            quanta, scales = self.quanta[number].numpy(), self.scales[number].numpy()
            _decode(quanta, scales, first, self.block, array[place : place + last - first])
        return out[: end - begin]

    def square_sum(self) -> float:
        """Σ x² in fp64; not finite where a scale is not."""

        def squares(begin: int, end: int) -> float:
            total = 0.0
            for number, first, last in self._places(begin, end):
                quanta, scales = self.quanta[number].numpy(), self.scales[number].numpy()
                total += _squares(quanta, scales, first, last, self.block)
            return total

        return sum(in_slices(squares, self.numel()))

    def _places(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(slot number, first, last) of the slots that overlap elements `begin` to `end`: their elements in there."""
        number = bisect_right(self.slots, begin, key=lambda slot: slot.offset) - 1
        while begin < end:
            slot = self.slots[number]
            last = min(slot.offset + slot.numel, end)
            if begin < last:
                yield number, begin - slot.offset, last - slot.offset
                begin = last
            number += 1
