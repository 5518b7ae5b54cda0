"""Sums over all parameters that a step size depends on: a pass over memory before the one that takes the step.

They are taken in fp64, block by block, and the blocks' sums in order: however many threads there are, the bits are the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freestep_service.optimizers.compiled import compiled, inlined, is_compiled
from freestep_service.optimizers.gradient import WIDENING, Gradient
from freestep_service.optimizers.slices import in_slices

__all__ = ["gradient_sums"]

BLOCK = 64 * 1024
"""Elements that are summed up by one thread."""


def gradient_sums(gradient: Gradient, z: Tensor, x: Tensor) -> tuple[float, float]:
    """Σ|g| and Σ g·(z - x), of flat vectors [numel], z and x fp32."""
    if not is_compiled(z):
        return _evaluate(gradient, z, x)
    pushed, scale, share, gathered = gradient
    loop = _loop(pushed.dtype, gathered is not None)
    arriving = (pushed if pushed.dtype == torch.float32 else pushed.view(torch.uint16)).numpy()
    before = arriving if gathered is None else gathered.numpy()
    vectors = [arriving, before, z.numpy(), x.numpy()]
    sums = np.zeros((-(-pushed.numel() // BLOCK), 2))

    def work(begin: int, end: int) -> None:
        # A block is the slice's in which it begins.
        for block in range(-(-begin // BLOCK), -(-end // BLOCK)):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            sums[block] = loop(np.float32(scale), np.float32(share), *(vector[part] for vector in vectors))

    in_slices(work, pushed.numel())
    return sum(sums[:, 0].tolist()), sum(sums[:, 1].tolist())


@cache
def _loop(dtype: torch.dtype, gathered: bool) -> Callable[..., tuple[float, float]]:
    """The compiled loop over a block, for gradients that come as `dtype`."""
    widened = inlined(WIDENING[dtype])

    def alone(scale: Any, share: Any, g: Any, h: Any) -> Any:
        return scale * (share * widened(g))

    def mean(scale: Any, share: Any, g: Any, h: Any) -> Any:
        return scale * (h + share * widened(g))

    whole = inlined(mean if gathered else alone)

    def loop(scale: Any, share: Any, pushed: Any, before: Any, z: Any, x: Any) -> Any:
        l1, inner = 0.0, 0.0
        for i in range(z.size):
            g = np.float64(whole(scale, share, pushed[i], before[i]))
            l1 += abs(g)
            inner += g * (np.float64(z[i]) - np.float64(x[i]))
        return l1, inner

    return compiled(loop, f"{dtype}.{'group' if gathered else 'one'}", reassociate=True)


def _evaluate(gradient: Gradient, z: Tensor, x: Tensor) -> tuple[float, float]:
    """The same by torch, a block after another."""
    l1, inner = (torch.zeros((), dtype=torch.float64, device=z.device) for _ in range(2))
    for begin in range(0, z.numel(), 256 * BLOCK):
        part = slice(begin, begin + 256 * BLOCK)
        g = gradient.part(part).evaluated(z.dtype).double()
        l1 += g.abs().sum()
        inner += (g * (z[part].double() - x[part].double())).sum()
    return float(l1), float(inner)
