"""Compiling all loops before they are needed, or loading them from disk, so that no push waits for it."""

from __future__ import annotations

import numpy as np
import torch

from freestep.hyperparameters import ALGORITHMS
from freestep_service.optimizers import METHODS
from freestep_service.optimizers.points import interpolate
from freestep_service.optimizers.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.squares import dequantize, square_sum, widen
from freestep_service.optimizers.sweep import Gradient, Segment, gather, initial_buffers, step

__all__ = ["compile_loops"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which gradients come and points are sent."""


def compile_loops() -> None:
    """Takes seconds the first time on a machine; runs each loop once, on one element, with the types of service."""
    layout, nought = (Segment("", 0, 1),), torch.zeros(1)
    quanta = Quanta(nought.to(torch.int8), nought.clone(), Blocks(np.array([0, 1]), ((0, 1, 1),)))
    for algorithm, method in METHODS.items():
        hyperparameters, buffers = {"": ALGORITHMS[algorithm]()}, initial_buffers(method, nought.clone())
        for dtype in DTYPES:
            for gathered in (None, nought):
                gradient = Gradient(nought.to(dtype), gathered=gathered)
                step(method, layout, hyperparameters, {"": method.initial}, buffers, gradient)
        for point in ("x", "y"):
            for dtype in DTYPES:
                interpolate(method, layout, hyperparameters, buffers, point, nought.to(dtype, copy=True))
            quantize(method, layout, hyperparameters, buffers, point, quanta)
    for dtype in DTYPES:
        for first in (True, False):
            gather(nought.clone(), nought.to(dtype), 1.0, first=first)
        square_sum(nought.to(dtype))
    dequantize(nought.to(torch.int8), nought, 1, nought.clone())
    for dtype in DTYPES[1:]:
        widen(nought.to(dtype), nought.clone())
