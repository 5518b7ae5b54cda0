"""Copies of a point of the state as int8: a q for each element and a scale for each block of them, in one pass.

A block's scale is its largest magnitude / 127, clamped to [SMALLEST, LARGEST], or 0 where all elements are 0. q is
x / scale, rounded to nearest even. A block with a NaN or an infinity has the scale NaN, so all of it decodes to NaN:
int8 has no other representation for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from freestep.wire.encoding import Encoding
from freestep.wire.manifest import Manifest
from freestep_service.optimizers.kernels.compiled import compiled, is_compiled
from freestep_service.optimizers.kernels.points import lerp, lerp_weights
from freestep_service.optimizers.kernels.slices import in_slices
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.kernels.sweep import CHUNK, Segment, within
from freestep_service.optimizers.method import Buffers, Method, Scalars

__all__ = ["Blocks", "Quanta", "quantize"]

SMALLEST = np.float32(2.0**-126)
"""The least scale but 0: smaller ones are subnormal, with too little precision."""
LARGEST = np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0))
"""The greatest scale whose product with 127 is finite."""
_MAGNITUDE, _FINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F7FFFFF)
"""Masks of fp32: all bits but the sign, and the bits of its greatest number."""
_ROUND = np.float32(1.5 * 2.0**23)
"""Adding it rounds to an integer; the lowest byte is then the integer, from -128 to 127, in two's complement."""
_0, _127, _NAN = np.float32(0), np.float32(127), np.float32(np.nan)


class Blocks(NamedTuple):
    """The blocks of a manifest's tensors; none spans two tensors.

    bounds: int64 [blocks + 1]; block i is elements bounds[i] to bounds[i + 1]. stretches: (begin, end, block size) of
    stretches in which all blocks have one size.
    """

    bounds: Any
    stretches: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, manifest: Manifest, encoding: Encoding) -> Self:
        """The blocks that an encoding divides the tensors into."""
        stretches = tuple(encoding.stretches(manifest.slots, CHUNK))
        begins = [np.arange(*stretch, dtype=np.int64) for stretch in stretches]
        return cls(np.concatenate([*begins, np.array([manifest.numel])]), stretches)

    def within(self, begin: int, end: int) -> slice:
        """The numbers of the blocks that begin in elements `begin` to `end`."""
        first, last = np.searchsorted(self.bounds[:-1], (begin, end))
        return slice(int(first), int(last))


class Quanta(NamedTuple):
    """The memory for a point as int8: `quanta` int8 [numel] and `scales` fp32 [blocks], both on the host."""

    quanta: Tensor
    scales: Tensor
    blocks: Blocks


def _quantize_block(values: Any, quanta: Any) -> Any:
    bits, largest = values.view(np.uint32), np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    if largest == 0 or largest > _FINITE:
        for i in range(quanta.size):
            quanta[i] = 0
        return _0 if largest == 0 else _NAN
    scale = min(max(np.uint32(largest).view(np.float32) / _127, SMALLEST), LARGEST)
    for i in range(quanta.size):
        quanta[i] = np.int8(np.float32(values[i] / scale + _ROUND).view(np.uint32))
    return scale


_block = compiled(_quantize_block)


def _quantize_copy(source: Any, bounds: Any, quanta: Any, scales: Any) -> None:
    for number in range(scales.size):
        begin, end = bounds[number], bounds[number + 1]
        scales[number] = _block(source[begin:end], quanta[begin:end])


def _quantize_lerp(y: Any, z: Any, weight: Any, bounds: Any, quanta: Any, scales: Any) -> None:
    values = np.empty(0, np.float32)
    for number in range(scales.size):
        begin, end = bounds[number], bounds[number + 1]
        if values.size < end - begin:
            values = np.empty(end - begin, np.float32)
        ys, zs, block = y[begin:end], z[begin:end], values[: end - begin]
        for i in range(block.size):
            block[i] = lerp(ys[i], zs[i], weight)
        scales[number] = _block(block, quanta[begin:end])


_copy, _interpolate = compiled(_quantize_copy), compiled(_quantize_lerp)


def quantize(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    point: Literal["x", "y", "z"],
    out: Quanta,
) -> None:
    """Writes a point as int8; otherwise like `interpolate`. No block spans two param groups."""
    layout, weights = tuple(layout), lerp_weights(method, hyperparameters, scalars, point)
    y, z = buffers["y"], buffers.get("z", buffers["y"])
    source = buffers.get(point, y)
    if not is_compiled(y):

        def values(segment: Segment) -> Tensor:
            part = slice(segment.begin, segment.end)
            return source[part] if weights is None else lerp(y[part], z[part], weights[segment.group])

        _evaluate(values, layout, out)
        settle(y.device)
        return
    arrays, quanta, scales = [each.numpy() for each in (source, y, z)], out.quanta.numpy(), out.scales.numpy()

    def work(begin: int, end: int) -> None:
        for segment in within(layout, begin, end):
            here = out.blocks.within(segment.begin, segment.end)
            bounds = out.blocks.bounds[here.start : here.stop + 1]
            if weights is None:
                _copy(arrays[0], bounds, quanta, scales[here])
            else:
                _interpolate(arrays[1], arrays[2], np.float32(weights[segment.group]), bounds, quanta, scales[here])

    in_slices(work, y.numel())


def _evaluate(values: Callable[[Segment], Tensor], layout: Iterable[Segment], out: Quanta) -> None:
    """By torch. values: a segment -> the point's elements there."""
    layout = tuple(layout)
    for begin, end, width in out.blocks.stretches:
        for segment in within(layout, begin, end):
            exact = values(segment).float().view(-1, width)
            largest = exact.abs().amax(1, keepdim=True)
            # By a tensor: for division by a number, a GPU multiplies by the rounded reciprocal.
            scales = largest.div(torch.full_like(largest, 127)).clamp_(float(SMALLEST), float(LARGEST))
            scales.masked_fill_(largest == 0, 0).masked_fill_(largest.isfinite().logical_not_(), torch.nan)
            # Where the scale is 0 or NaN, the quotients are NaN.
            quanta = exact.div(scales).nan_to_num_(0).round_().to(torch.int8)
            out.quanta[segment.begin : segment.end].copy_(quanta.view(-1), non_blocking=True)
            out.scales[out.blocks.within(segment.begin, segment.end)].copy_(scales.view(-1), non_blocking=True)
