"""Compiling loops and kernels before they are needed, or loading them from disk, so that no push waits for it."""

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
from freestep_service.optimizers.kernels.squares import square_sum, widen
from freestep_service.optimizers.kernels.sweep import Segment, gather, step
from freestep_service.optimizers.method import Method

__all__ = ["compile_kernels", "compile_loops", "compile_rule"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which gradients come and points are sent."""

_LAYOUT = (Segment("", 0, 1),)
_USUAL = (specs.SGDScheduleFree, specs.AdamWScheduleFree, specs.RAdamScheduleFree, specs.SGD, specs.AdamW)
"""Whose rules are compiled whether or not a run has them; those of the others, when a run does."""
_STEPS = 32
"""By then a method's first steps, which some rules make otherwise, are over."""
_APART = 4
"""fp32 elements after which a vector is as aligned as at its beginning."""


def compile_loops() -> None:
    """Takes seconds the first time on a machine; runs each loop once, on one element, with the types of service."""
    nought = torch.zeros(1)
    quanta = Quanta(nought.to(torch.int8), nought.clone(), Blocks(np.array([0, 1]), ((0, 1, 1),)))
    for usual in _USUAL:
        compile_rule(usual(), gathers=True)
    # Two that between them have all loops of points.
    for chosen in (specs.AdamWScheduleFree(), specs.SGD()):
        method, hyperparameters = method_of(chosen), {"": chosen}
        scalars, buffers = {"": method.initial}, initial_buffers(method, nought.clone())
        for point in ("x", "y"):
            for dtype in DTYPES:
                interpolate(method, _LAYOUT, hyperparameters, scalars, buffers, point, nought.to(dtype, copy=True))
            quantize(method, _LAYOUT, hyperparameters, scalars, buffers, point, quanta)
    for dtype in DTYPES:
        for first in (True, False):
            gather(nought.clone(), nought.to(dtype), 1.0, first=first)
        square_sum(nought.to(dtype))
    came = Quantized([Slot("", (1,), "", 0, 1)], [nought.to(torch.int8)], [nought], 1)
    came.decoded(0, 1, nought.clone())
    came.square_sum()
    for dtype in DTYPES[1:]:
        widen(nought.to(dtype), nought.clone())


def compile_rule(hyperparameters: specs.OptimizerSpec, *, gathers: bool) -> None:
    """Compiles what a step takes on the host, of groups of pushes too where a run `gathers` them.

    Takes about half a second for each dtype in which gradients come, twice that with groups, unless it is on disk.
    """
    # Where a direction is made first, it is to the loop a gradient as others are.
    method, nought = replace(method_of(hyperparameters), direction=None), torch.zeros(1)
    buffers = initial_buffers(method, nought.clone())
    for dtype in DTYPES:
        for gathered in (None, nought) if gathers else (None,):
            gradient = Gradient(nought.to(dtype), gathered=gathered)
            step(method, _LAYOUT, {"": hyperparameters}, {"": method.initial}, buffers, gradient)


def compile_kernels(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    device: torch.device,
    *,
    gathers: bool,
) -> None:
    """Compiles what a run takes on a GPU, of groups of pushes too where it `gathers` them.

    Takes seconds for each kernel. Takes some steps on small vectors whose segments are as those of `layout`: of the
    same groups, and as well aligned.
    """
    places = sorted({(segment.group, segment.begin % _APART) for segment in layout if segment.begin < segment.end})
    small = [
        Segment(group, 2 * _APART * number + offset, 2 * _APART * number + offset + 2)
        for number, (group, offset) in enumerate(places)
    ]
    method, nought = replace(method, direction=None), torch.zeros(2 * _APART * len(small), device=device)
    for gathered in (None, nought) if gathers else (None,):
        buffers, scalars = initial_buffers(method, nought.clone()), dict.fromkeys(hyperparameters, method.initial)
        for number in range(_STEPS):
            # Changing and staying in turn.
            taken = Conditions(expected_staleness=number // 2 % 2)
            gradient = Gradient(nought, gathered=gathered)
            scalars = step(method, small, hyperparameters, scalars, buffers, gradient, taken)
    for first in (True, False) if gathers else ():
        gather(nought.clone(), nought, 1.0, first=first)
