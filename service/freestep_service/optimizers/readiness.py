"""Compiles loops and kernels before they are needed, or loads them from disk, so that no push waits for a compiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from freestep.api import hyperparameters as specs
from freestep.wire.manifest import Slot
from freestep_service.optimizers import Conditions, Gradient, initial_buffers, method_of
from freestep_service.optimizers.kernels.points import interpolate
from freestep_service.optimizers.kernels.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.kernels.quantized import Quantized
from freestep_service.optimizers.kernels.robust import square_distances, trimmed_mean
from freestep_service.optimizers.kernels.squares import square_sum, widen
from freestep_service.optimizers.kernels.sweep import Segment, gather, step
from freestep_service.optimizers.method import Method

__all__ = ["compile_kernels", "compile_loops", "compile_robust", "compile_rule"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of pushed gradients and of points."""

_LAYOUT = (Segment("", 0, 1),)
_COMMON = (specs.SGDScheduleFree, specs.AdamWScheduleFree, specs.RAdamScheduleFree, specs.SGD, specs.AdamW)
"""Algorithms whose rules are compiled when the service starts; the others' are compiled for the run that has them."""
_STEPS = 32
"""Steps after which the branches that some rules take in their first steps are over."""
_ALIGNMENT = 4
"""Alignment of vectors that kernels are compiled for, in fp32 elements."""


def compile_loops() -> None:
    """Calls each loop once, on one element, with the types that the service calls it with.

    Takes seconds the first time on a machine.
    """
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")
    quanta = Quanta(zero.to(torch.int8), zero.clone(), Blocks(np.array([0, 1]), ((0, 1, 1),)))
    for common in _COMMON:
        compile_rule(common(), gathers=True)
    # These two between them use all loops of points.
    for chosen in (specs.AdamWScheduleFree(), specs.SGD()):
        method, hyperparameters = method_of(chosen), {"": chosen}
        scalars, buffers = {"": method.initial}, initial_buffers(method, zero.clone())
        for point in ("x", "y"):
            for dtype in DTYPES:
                interpolate(method, _LAYOUT, hyperparameters, scalars, buffers, point, zero.to(dtype, copy=True))
            quantize(method, _LAYOUT, hyperparameters, scalars, buffers, point, quanta)
    for dtype in DTYPES:
        for first in (True, False):
            gather(zero.clone(), zero.to(dtype), 1.0, first=first)
        square_sum(zero.to(dtype))
    quantized = Quantized([Slot("", (1,), "", 0, 1)], [zero.to(torch.int8)], [zero], 1)
    quantized.decoded(0, 1, zero.clone())
    quantized.square_sum()
    for dtype in DTYPES[1:]:
        widen(zero.to(dtype), zero.clone())


def compile_rule(hyperparameters: specs.OptimizerSpec, *, gathers: bool) -> None:
    """Compiles the loops of a step on the host. gathers: whether updates may be made of several pushes.

    Takes about half a second for each dtype of gradients, twice that with `gathers`, unless the code is on disk.
    """
    # For the loop, a direction is a gradient like any other.
    method = replace(method_of(hyperparameters), direction=None)
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")
    buffers = initial_buffers(method, zero.clone())
    for dtype in DTYPES:
        for gathered in (None, zero) if gathers else (None,):
            gradient = Gradient(zero.to(dtype), gathered=gathered)
            step(method, _LAYOUT, {"": hyperparameters}, {"": method.initial}, buffers, gradient)


def compile_robust() -> None:
    """Compiles the loops of robust means on the host. Takes seconds, unless the code is on disk."""
    rows = torch.zeros(3, 1, dtype=torch.float32, device="cpu")
    trimmed_mean(rows, 1)
    square_distances(rows)


def compile_kernels(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    device: torch.device,
    *,
    gathers: bool,
) -> None:
    """Compiles the kernels of a step on a GPU. gathers: whether updates may be made of several pushes.

    Takes seconds for each kernel. Takes some steps on small vectors, whose segments have the groups and the alignment
    of those of `layout`.
    """
    places = sorted({(segment.group, segment.begin % _ALIGNMENT) for segment in layout if segment.begin < segment.end})
    small = [
        Segment(group, 2 * _ALIGNMENT * number + offset, 2 * _ALIGNMENT * number + offset + 2)
        for number, (group, offset) in enumerate(places)
    ]
    method = replace(method, direction=None)
    zero = torch.zeros(2 * _ALIGNMENT * len(small), dtype=torch.float32, device=device)
    for gathered in (None, zero) if gathers else (None,):
        buffers, scalars = initial_buffers(method, zero.clone()), dict.fromkeys(hyperparameters, method.initial)
        for number in range(_STEPS):
            # A staleness that changes, and one that stays, select different branches of a rule.
            conditions = Conditions(expected_staleness=number // 2 % 2)
            gradient = Gradient(zero, gathered=gathered)
            scalars = step(method, small, hyperparameters, scalars, buffers, gradient, conditions)
    for first in (True, False) if gathers else ():
        gather(zero.clone(), zero, 1.0, first=first)
