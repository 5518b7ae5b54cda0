"""Copying a point out of the state as int8: a scale for each block of elements, and a q for each of them, in one pass.

A block's scale is its largest magnitude / 127, within SMALLEST and LARGEST, and 0 where all of it is 0. q is x / scale,
rounded to nearest even. A block in which an element is NaN or infinite has the scale NaN, and so is NaN as a whole:
int8 has no other way to say it.
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
from freestep_service.optimizers.kernels.points import mix, mixture
from freestep_service.optimizers.kernels.slices import in_slices
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.kernels.sweep import CHUNK, Segment, within
from freestep_service.optimizers.method import Buffers, Method, Scalars

__all__ = ["Blocks", "Quanta", "quantize"]

SMALLEST = np.float32(2.0**-126)
"""The least scale but 0: smaller ones are subnormal, and of less precision than a quantum needs."""
LARGEST = np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0))
"""The greatest: 127 of the next one are infinite."""
_MAGNITUDE, _FINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F7FFFFF)
"""The bits of fp32 that are not the sign, and those of its greatest number."""
_ROUND = np.float32(1.5 * 2.0**23)
"""Adding it leaves integers: in the lowest byte, as two's complement, those from -128 to 127."""
_0, _127, _NAN = np.float32(0), np.float32(127), np.float32(np.nan)


class Blocks(NamedTuple):
    """Where the blocks of a manifest lie: each from one of `bounds`, int64 [count + 1], to the next.

    stretches: begin, end and the elements of a block, where blocks of one size follow each other.
    """

    bounds: Any
    stretches: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, manifest: Manifest, encoding: Encoding) -> Self:
        stretches = tuple(encoding.stretches(manifest.slots, CHUNK))
        begins = [np.arange(*stretch, dtype=np.int64) for stretch in stretches]
        return cls(np.concatenate([*begins, np.array([manifest.numel])]), stretches)

    def within(self, begin: int, end: int) -> slice:
        """Those that begin in a stretch of elements."""
        first, last = np.searchsorted(self.bounds[:-1], (begin, end))
        return slice(int(first), int(last))


class Quanta(NamedTuple):
    """Where a point is written as int8: `quanta` int8 [numel] and `scales` fp32 [blocks], both on the host."""

    quanta: Tensor
    scales: Tensor
    blocks: Blocks


def _quantizing(values: Any, quanta: Any) -> Any:
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


_block = compiled(_quantizing)


def _copying(source: Any, bounds: Any, quanta: Any, scales: Any) -> None:
    for number in range(scales.size):
        begin, end = bounds[number], bounds[number + 1]
        scales[number] = _block(source[begin:end], quanta[begin:end])


def _mixing(y: Any, z: Any, weight: Any, bounds: Any, quanta: Any, scales: Any) -> None:
    some = np.empty(0, np.float32)
    for number in range(scales.size):
        begin, end = bounds[number], bounds[number + 1]
        if some.size < end - begin:
            some = np.empty(end - begin, np.float32)
        ys, zs, mixed = y[begin:end], z[begin:end], some[: end - begin]
        for i in range(mixed.size):
            mixed[i] = mix(ys[i], zs[i], weight)
        scales[number] = _block(mixed, quanta[begin:end])


_copy, _mix = compiled(_copying), compiled(_mixing)


def quantize(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    point: Literal["x", "y", "z"],
    out: Quanta,
) -> None:
    """As `interpolate`, to int8; no block is of two tensors, and so none is of two groups."""
    layout, weights = tuple(layout), mixture(method, hyperparameters, scalars, point)
    y, z = buffers["y"], buffers.get("z", buffers["y"])
    source = buffers.get(point, y)
    if not is_compiled(y):

        def values(segment: Segment) -> Tensor:
            part = slice(segment.begin, segment.end)
            return source[part] if weights is None else mix(y[part], z[part], weights[segment.group])

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
                _mix(arrays[1], arrays[2], np.float32(weights[segment.group]), bounds, quanta, scales[here])

    in_slices(work, y.numel())


def _evaluate(values: Callable[[Segment], Tensor], layout: Iterable[Segment], out: Quanta) -> None:
    """By torch; `values` is a stretch of the point."""
    layout = tuple(layout)
    for begin, end, width in out.blocks.stretches:
        for segment in within(layout, begin, end):
            exact = values(segment).float().view(-1, width)
            largest = exact.abs().amax(1, keepdim=True)
            # By a tensor, since of a number a GPU takes the reciprocal, which is rounded.
            scales = largest.div(torch.full_like(largest, 127)).clamp_(float(SMALLEST), float(LARGEST))
            scales.masked_fill_(largest == 0, 0).masked_fill_(largest.isfinite().logical_not_(), torch.nan)
            # Where a block has no other quanta than 0, its elements / its scale are NaN.
            quanta = exact.div(scales).nan_to_num_(0).round_().to(torch.int8)
            out.quanta[segment.begin : segment.end].copy_(quanta.view(-1), non_blocking=True)
            out.scales[out.blocks.within(segment.begin, segment.end)].copy_(scales.view(-1), non_blocking=True)
