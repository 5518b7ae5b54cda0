"""Copying a point, x, y or z, out of the state, rounded to the dtype in which it travels: one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import compiled, inlined, is_compiled
from freestep_service.optimizers.kernels.halves import bf16_bits, f16_bits
from freestep_service.optimizers.kernels.slices import in_slices
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.kernels.sweep import CHUNK, Segment, within
from freestep_service.optimizers.method import Buffers, Method, Scalars

__all__ = ["interpolate", "mix", "mixture"]

STRETCH = 2 * 1024 * 1024
"""Elements that take far longer to copy than to be told of."""


def _same(x: Any) -> Any:
    return x


_ROUNDING: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.float32: _same,
    torch.bfloat16: bf16_bits,
    torch.float16: f16_bits,
}


@inlined
def mix(y: Any, z: Any, weight: Any) -> Any:
    return y + weight * (z - y)


def _copying(rounded: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    rounded = inlined(rounded)

    def loop(source: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = rounded(source[i])

    return compiled(loop, rounded.__name__)


def _mixing(rounded: Callable[[Any], Any]) -> Callable[[Any, Any, Any, Any], None]:
    rounded = inlined(rounded)

    def loop(y: Any, z: Any, weight: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = rounded(mix(y[i], z[i], weight))

    return compiled(loop, rounded.__name__)


_COPYING = {dtype: _copying(rounded) for dtype, rounded in _ROUNDING.items()}
_MIXING = {dtype: _mixing(rounded) for dtype, rounded in _ROUNDING.items()}


def interpolate(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    point: Literal["x", "y", "z"],
    out: Tensor,
    note: Callable[[int], object] | None = None,
) -> None:
    """Writes a point, flat [numel], into `out`, rounding it to the dtype of `out`, to nearest even.

    x = y + (1 - 1/β)(z - y) in fp32; methods that keep one point have x = y = z.

    note: called with how many elements are there, again and again where compiled loops write them.
    """
    weights = mixture(method, hyperparameters, scalars, point)
    if weights is not None:
        _copy_x(tuple(layout), weights, buffers["y"], buffers["z"], out, note)
    else:
        _copy(buffers.get(point, buffers["y"]), out, note)


def mixture(
    method: Method, hyperparameters: Mapping[str, Any], scalars: Mapping[str, Scalars], point: str
) -> dict[str, float] | None:
    """By group, how much of z - y is added to y; None where the point is one of the state's vectors."""
    if point != "x" or method.interpolation is None:
        return None
    return {group: 1 - 1 / method.interpolation(hyperparameters[group], state) for group, state in scalars.items()}


def _copy(source: Tensor, out: Tensor, note: Callable[[int], object] | None) -> None:
    if not is_compiled(source):
        _evaluate(lambda part: source[part], 0, source.numel(), out)
        settle(source.device)
        return
    loop, elements, places = _COPYING[out.dtype], source.numpy(), _places(out)
    _in_stretches(lambda begin, end: loop(elements[begin:end], places[begin:end]), source.numel(), note)


def _copy_x(
    layout: tuple[Segment, ...],
    weights: Mapping[str, float],
    y: Tensor,
    z: Tensor,
    out: Tensor,
    note: Callable[[int], object] | None,
) -> None:
    if not is_compiled(y):
        for segment in layout:
            mixed = partial(_mixed, y, z, weights[segment.group])
            _evaluate(mixed, segment.begin, segment.end, out)
        settle(y.device)
        return
    loop, ys, zs, places = _MIXING[out.dtype], y.numpy(), z.numpy(), _places(out)

    def work(begin: int, end: int) -> None:
        for segment in within(layout, begin, end):
            part = slice(segment.begin, segment.end)
            loop(ys[part], zs[part], np.float32(weights[segment.group]), places[part])

    _in_stretches(work, y.numel(), note)


def _in_stretches(work: Callable[[int, int], None], numel: int, note: Callable[[int], object] | None) -> None:
    """As `in_slices`; where it is to be noted how far that is, one stretch after the other."""
    if note is None:
        in_slices(work, numel)
        return
    for first in range(0, numel, STRETCH):
        size = min(STRETCH, numel - first)
        in_slices(lambda begin, end, first=first: work(first + begin, first + end), size)  # type: ignore[misc]
        note(first + size)


def _mixed(y: Tensor, z: Tensor, weight: float, part: slice) -> Tensor:
    mixed: Tensor = mix(y[part], z[part], weight)
    return mixed


def _evaluate(values: Callable[[slice], Tensor], begin: int, end: int, out: Tensor) -> None:
    """By torch, rounded where the values are; returns before a GPU has done what it was asked."""
    for first in range(begin, end, CHUNK):
        part = slice(first, min(first + CHUNK, end))
        out[part].copy_(values(part).to(out.dtype), non_blocking=True)


def _places(out: Tensor) -> Any:
    """The memory of `out` as an array: halves as their bits."""
    return (out if out.dtype == torch.float32 else out.view(torch.uint16)).numpy()
