"""Copies of a point of the state, x, y or z, rounded to the dtype in which it is sent: one pass over memory."""

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

__all__ = ["interpolate", "lerp", "lerp_weights"]

STRETCH = 2 * 1024 * 1024
"""Elements between two reports of progress: copying them takes far longer than a report."""


def _identity(x: Any) -> Any:
    return x


_ROUNDING: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.float32: _identity,
    torch.bfloat16: bf16_bits,
    torch.float16: f16_bits,
}


@inlined
def lerp(y: Any, z: Any, weight: Any) -> Any:
    """From y, at weight 0, to z, at weight 1."""
    return y + weight * (z - y)


def _copy_loop(rounded: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    rounded = inlined(rounded)

    def loop(source: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = rounded(source[i])

    return compiled(loop, rounded.__name__)


def _lerp_loop(rounded: Callable[[Any], Any]) -> Callable[[Any, Any, Any, Any], None]:
    rounded = inlined(rounded)

    def loop(y: Any, z: Any, weight: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = rounded(lerp(y[i], z[i], weight))

    return compiled(loop, rounded.__name__)


_COPYING = {dtype: _copy_loop(rounded) for dtype, rounded in _ROUNDING.items()}
_INTERPOLATING = {dtype: _lerp_loop(rounded) for dtype, rounded in _ROUNDING.items()}


def interpolate(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    point: Literal["x", "y", "z"],
    out: Tensor,
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a point, flat [numel], into `out` [numel] on the host: fp32, or rounded to BF16 or F16, to nearest even.

    x = y + (1 - 1/β)(z - y) in fp32, with each param group's β; of methods that keep one point, x = y = z.

    hyperparameters, scalars: by param group. on_progress: where compiled loops write, called repeatedly with the number
    of elements that are written, from the front.
    """
    weights = lerp_weights(method, hyperparameters, scalars, point)
    if weights is not None:
        _interpolate_x(tuple(layout), weights, buffers["y"], buffers["z"], out, on_progress)
    else:
        _copy(buffers.get(point, buffers["y"]), out, on_progress)


def lerp_weights(
    method: Method, hyperparameters: Mapping[str, Any], scalars: Mapping[str, Scalars], point: str
) -> dict[str, float] | None:
    """By param group, the weight of z in the point; None where the point is a state vector."""
    if point != "x" or method.interpolation is None:
        return None
    return {group: 1 - 1 / method.interpolation(hyperparameters[group], state) for group, state in scalars.items()}


def _copy(source: Tensor, out: Tensor, on_progress: Callable[[int], object] | None) -> None:
    if not is_compiled(source):
        _evaluate(lambda part: source[part], 0, source.numel(), out)
        settle(source.device)
        return
    loop, elements, places = _COPYING[out.dtype], source.numpy(), _places(out)
    _in_stretches(lambda begin, end: loop(elements[begin:end], places[begin:end]), source.numel(), on_progress)


def _interpolate_x(
    layout: tuple[Segment, ...],
    weights: Mapping[str, float],
    y: Tensor,
    z: Tensor,
    out: Tensor,
    on_progress: Callable[[int], object] | None,
) -> None:
    if not is_compiled(y):
        for segment in layout:
            values = partial(_lerp_part, y, z, weights[segment.group])
            _evaluate(values, segment.begin, segment.end, out)
        settle(y.device)
        return
    loop, ys, zs, places = _INTERPOLATING[out.dtype], y.numpy(), z.numpy(), _places(out)

    def work(begin: int, end: int) -> None:
        for segment in within(layout, begin, end):
            part = slice(segment.begin, segment.end)
            loop(ys[part], zs[part], np.float32(weights[segment.group]), places[part])

    _in_stretches(work, y.numel(), on_progress)


def _in_stretches(work: Callable[[int, int], None], numel: int, on_progress: Callable[[int], object] | None) -> None:
    """Like `in_slices`; where progress is reported, one stretch after the other."""
    if on_progress is None:
        in_slices(work, numel)
        return
    for first in range(0, numel, STRETCH):
        size = min(STRETCH, numel - first)
        in_slices(lambda begin, end, first=first: work(first + begin, first + end), size)  # type: ignore[misc]
        on_progress(first + size)


def _lerp_part(y: Tensor, z: Tensor, weight: float, part: slice) -> Tensor:
    values: Tensor = lerp(y[part], z[part], weight)
    return values


def _evaluate(values: Callable[[slice], Tensor], begin: int, end: int, out: Tensor) -> None:
    """By torch, rounded on the device of the values; returns before a GPU has finished."""
    for first in range(begin, end, CHUNK):
        part = slice(first, min(first + CHUNK, end))
        out[part].copy_(values(part).to(out.dtype), non_blocking=True)


def _places(out: Tensor) -> Any:
    """The memory of `out` as an array; of BF16 and F16, their bits as uint16."""
    return (out if out.dtype == torch.float32 else out.view(torch.uint16)).numpy()
