"""Carrying a method over a run's flat vectors: param groups as segments, segments in chunks.

A step is a handful of passes over memory if each operation runs over whole vectors, and one if all operations
run over a chunk that stays in the cache; so vectors on the CPU are swept in chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import hypot, isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from freestep.wire import Slot
from freestep_service.optimizers.method import Buffers, Method, Scalars

__all__ = ["Segment", "initial_buffers", "interpolate", "norm", "segments", "step"]

CHUNK = 128 * 1024
"""Elements: at 4 bytes, five vectors' chunks fit in a core's second-level cache of 2 MiB and more."""


@dataclass(frozen=True)
class Segment:
    """Elements `begin` to `end` of the flat vector, all of one param group."""

    group: str
    begin: int
    end: int


def segments(slots: Iterable[Slot]) -> tuple[Segment, ...]:
    """The param groups' stretches of the flat vector, as few as the manifest's order allows."""
    found = []
    for group, members in groupby(slots, key=lambda slot: slot.group):
        run = list(members)
        found.append(Segment(group, run[0].offset, run[-1].offset + run[-1].numel))
    return tuple(found)


def initial_buffers(method: Method, parameters: Tensor) -> dict[str, Tensor]:
    """The method's state before the first step; takes `parameters`, flat fp32 [numel], as its y."""
    made = {"y": parameters}
    for name in method.buffers:
        if name != "y":
            made[name] = parameters.clone() if name == "z" else torch.zeros_like(parameters)
    return made


def step(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    gradient: Tensor,
    *,
    scale: float = 1.0,
    damping: float = 1.0,
) -> dict[str, Scalars]:
    """Moves the buffers, in place, one step along `scale * gradient`, and returns the groups' next scalars.

    `gradient`, flat fp32 [numel], is used up: its contents afterwards are unspecified.
    """
    advanced = {group: method.advance(hyperparameters[group], state, damping) for group, state in scalars.items()}
    for segment in layout:
        coefficients = advanced[segment.group][1]
        for begin, end in _chunks(segment, gradient):
            g = gradient[begin:end]
            if scale != 1.0:
                g.mul_(scale)
            method.update(g, {name: vector[begin:end] for name, vector in buffers.items()}, coefficients)
    return {group: following for group, (following, _) in advanced.items()}


def interpolate(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    buffers: Buffers,
    point: Literal["x", "y", "z"],
    out: Tensor,
) -> None:
    """Writes a point, flat [numel], into `out`, rounding it to the dtype of `out`.

    x = y + (1 - 1/β)(z - y) in fp32; methods that keep one point have x = y = z.
    """
    if point != "x" or method.interpolation is None:
        out.copy_(buffers[point] if point in buffers else buffers["y"])
        return
    y, z = buffers["y"], buffers["z"]
    for segment in layout:
        weight = 1 - 1 / method.interpolation(hyperparameters[segment.group])
        for begin, end in _chunks(segment, y):
            out[begin:end].copy_(torch.lerp(y[begin:end], z[begin:end], weight))


def norm(gradient: Tensor, *, exact: bool = False) -> float | None:
    """The 2-norm of a flat fp32 vector, or None when it holds NaN or infinity.

    One pass when all is well. A norm that overflows fp32 though every element is finite is taken again in fp64; with
    `exact` it is fp64 at once, at twice the cost, so that the norms of a vector's parts make up that of the whole to
    far below fp32's rounding.
    """
    dtype = torch.float64 if exact else None
    total = hypot(*(float(torch.linalg.vector_norm(chunk, dtype=dtype)) for chunk in _split(gradient)))
    if isfinite(total):
        return total
    if not all(bool(torch.isfinite(chunk).all()) for chunk in _split(gradient)):
        return None
    return hypot(*(float(torch.linalg.vector_norm(chunk.double())) for chunk in _split(gradient)))


def _split(vector: Tensor) -> tuple[Tensor, ...]:
    return torch.split(vector, CHUNK) if vector.numel() else ()


def _chunks(segment: Segment, vector: Tensor) -> Iterator[tuple[int, int]]:
    size = CHUNK if vector.device.type == "cpu" else max(segment.end - segment.begin, 1)
    for begin in range(segment.begin, segment.end, size):
        yield begin, min(begin + size, segment.end)
