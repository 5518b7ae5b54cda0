"""A gradient in int8, as it came: an element is q · the scale of its block.

It is measured as that, and made fp32 where a pass over memory needs it, a piece at a time, so that no fp32 number of it
is ever read from memory.
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


def _decoding(quanta: Any, scales: Any, first: Any, block: Any, out: Any) -> None:
    at = 0
    while at < out.size:
        number = (first + at) // block
        end = min((number + 1) * block - first, out.size)
        scale, some, place = scales[number], quanta[first + at : first + end], out[at:end]
        for i in range(place.size):
            place[i] = np.float32(some[i]) * scale
        at = end


def _measuring(quanta: Any, scales: Any, first: Any, last: Any, block: Any) -> Any:
    total = 0.0
    while first < last:
        number = first // block
        end = min((number + 1) * block, last)
        scale, some, of_block = scales[number], quanta[first:end], 0.0
        for i in range(some.size):
            x = np.float64(np.float32(some[i]) * scale)
            of_block += x * x
        total += of_block
        first = end
    return total


_decode, _squares = compiled(_decoding), compiled(_measuring, reassociate=True)


class Quantized(NamedTuple):
    """One flat vector [numel] on the host, of `slots` in their order.

    quanta: int8 of each slot. scales: fp32 of each slot, one for each `block` of its elements.
    """

    slots: Sequence[Slot]
    quanta: Sequence[Tensor]
    scales: Sequence[Tensor]
    block: int

    def numel(self) -> int:
        return self.slots[-1].offset + self.slots[-1].numel if self.slots else 0

    def decoded(self, begin: int, end: int, out: Tensor) -> Tensor:
        """Elements `begin` to `end`, written into the first of `out`, fp32.

        `out` may be the memory in whose slots the quanta lie right-aligned: what is yet to be read is not overtaken.
        """
        array = out.numpy()
        for number, first, last in self._places(begin, end):
            at = self.slots[number].offset + first - begin
            quanta, scales = self.quanta[number].numpy(), self.scales[number].numpy()
            _decode(quanta, scales, first, self.block, array[at : at + last - first])
        return out[: end - begin]

    def square_sum(self) -> float:
        """As `square_sum` of the decoded vector."""

        def squares(begin: int, end: int) -> float:
            total = 0.0
            for number, first, last in self._places(begin, end):
                quanta, scales = self.quanta[number].numpy(), self.scales[number].numpy()
                total += _squares(quanta, scales, first, last, self.block)
            return total

        return sum(in_slices(squares, self.numel()))

    def _places(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The slots that make up a stretch of the vector, by number, with the first and last of their elements."""
        number = bisect_right(self.slots, begin, key=lambda slot: slot.offset) - 1
        while begin < end:
            slot = self.slots[number]
            last = min(slot.offset + slot.numel, end)
            if begin < last:
                yield number, begin - slot.offset, last - slot.offset
                begin = last
            number += 1
