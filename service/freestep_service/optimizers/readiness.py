"""Compiling loops and kernels before they are needed, or loading them from disk, so that no push waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from freestep.models import ALGORITHMS
from freestep_service.optimizers import METHODS
from freestep_service.optimizers.compiled import is_compiled
from freestep_service.optimizers.method import Method
from freestep_service.optimizers.points import interpolate
from freestep_service.optimizers.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.squares import dequantize, square_sum, widen
from freestep_service.optimizers.sweep import Segment, gather, initial_buffers, step

__all__ = ["compile_kernels", "compile_loops"]

_STEPS = 32
"""By then a method's first steps, which some rules make otherwise, are over."""
_APART = 4
"""fp32 elements after which a vector is as aligned as at its beginning."""


def compile_loops() -> None:
    """Takes seconds the first time on a machine; runs each loop once, on one element, with the types of service."""
    layout, nought = (Segment("", 0, 1),), torch.zeros(1)
    quanta = Quanta(nought.to(torch.int8), nought.clone(), Blocks(np.array([0, 1]), ((0, 1, 1),)))
    for algorithm, method in METHODS.items():
        hyperparameters, buffers = {"": ALGORITHMS[algorithm]()}, initial_buffers(method, nought.clone())
        step(method, layout, hyperparameters, {"": method.initial}, buffers, nought)
        for point in ("x", "y"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                interpolate(method, layout, hyperparameters, buffers, point, nought.to(dtype, copy=True))
            quantize(method, layout, hyperparameters, buffers, point, quanta)
    for first in (True, False):
        gather(nought.clone(), nought, 1.0, first=first)
    square_sum(nought)
    dequantize(nought.to(torch.int8), nought, 1, nought.clone())
    for dtype in (torch.bfloat16, torch.float16):
        widen(nought.to(dtype), nought.clone())


def compile_kernels(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    device: torch.device,
    *,
    gathers: bool,
) -> None:
    """Takes seconds for each of the kernels that a run on a GPU needs, the first time; on the host there are none.

    gathers: whether pushes are gathered before they become a step. Takes a few steps on small vectors whose segments
    are as those of `layout`: of the same groups, and as well aligned.
    """
    places = sorted({(segment.group, segment.begin % _APART) for segment in layout if segment.begin < segment.end})
    small = [
        Segment(group, 2 * _APART * number + offset, 2 * _APART * number + offset + 2)
        for number, (group, offset) in enumerate(places)
    ]
    gradient = torch.zeros(2 * _APART * len(small), device=device)
    if is_compiled(gradient):
        return
    buffers, scalars = initial_buffers(method, gradient.clone()), dict.fromkeys(hyperparameters, method.initial)
    for _ in range(_STEPS):
        scalars = step(method, small, hyperparameters, scalars, buffers, gradient)
    for first in (True, False) if gathers else ():
        gather(gradient.clone(), gradient, 1.0, first=first)
