"""Sums over all parameters that a step size depends on: a pass over memory before the one that takes the step.

They are taken in fp64 for each block, and the blocks' sums are added in order, so that the bits do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import compiled, is_compiled
from freestep_service.optimizers.kernels.gradient import Gradient, element_function
from freestep_service.optimizers.kernels.slices import in_slices

__all__ = ["gradient_sums"]

BLOCK = 64 * 1024
"""Elements of a block, which one thread sums up."""


def gradient_sums(gradient: Gradient, z: Tensor, x: Tensor) -> tuple[float, float]:
    """(Σ|g|, Σ g·(z - x)) in fp64, of a gradient and of fp32 vectors, all flat [numel]."""
    if not is_compiled(z):
        return _evaluate(gradient, z, x)
    numel = gradient.pushed.numel()
    loop = _loop(gradient.dtype, gradient.gathered is not None)
    scale, share = np.float32(gradient.scale), np.float32(gradient.share)
    vectors, sums = [z.numpy(), x.numpy()], np.zeros((-(-numel // BLOCK), 2))

    def work(begin: int, end: int) -> None:
        # A block belongs to the slice in which it begins.
        for block in range(-(-begin // BLOCK), -(-end // BLOCK)):
            pieces = gradient.pieces(block * BLOCK, min((block + 1) * BLOCK, numel))
            for part, pushed, gathered in pieces:
                sums[block] += loop(scale, share, pushed, gathered, *(vector[part] for vector in vectors))

    in_slices(work, numel)
    return sum(sums[:, 0].tolist()), sum(sums[:, 1].tolist())


@cache
def _loop(dtype: torch.dtype, gathered: bool) -> Callable[..., tuple[float, float]]:
    """The compiled loop over a block. dtype: that of `Gradient.pieces`."""
    element = element_function(dtype, gathered=gathered)

    def loop(scale: Any, share: Any, pushed: Any, before: Any, z: Any, x: Any) -> Any:
        l1, inner = 0.0, 0.0
        for i in range(z.size):
            g = np.float64(element(scale, share, pushed[i], before[i]))
            l1 += abs(g)
            inner += g * (np.float64(z[i]) - np.float64(x[i]))
        return l1, inner

    return compiled(loop, f"{dtype}.{'group' if gathered else 'one'}", reassociate=True)


def _evaluate(gradient: Gradient, z: Tensor, x: Tensor) -> tuple[float, float]:
    """The same, by torch."""
    l1, inner = (torch.zeros((), dtype=torch.float64, device=z.device) for _ in range(2))
    for begin in range(0, z.numel(), 256 * BLOCK):
        part = slice(begin, begin + 256 * BLOCK)
        g = gradient.part(part).evaluated(z.dtype).double()
        l1 += g.abs().sum()
        inner += (g * (z[part].double() - x[part].double())).sum()
    return float(l1), float(inner)
