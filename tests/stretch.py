"""A part of a run's vectors that is stepped as a shard steps it, and the rules and sizes that are tested most."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from forms import hyperparameters, own
from freestep_service.optimizers import Conditions, Gradient, Segment, initial_buffers, interpolate, method_of, step
from freestep_service.optimizers.kernels.slices import LEAST

USUAL = ["sgd_schedule_free", "adamw_schedule_free", "radam_schedule_free", "sgd", "adamw"]
"""Forms whose rules are compiled at a service's start, and are tested at all sizes."""
LARGE = 3 * LEAST + 17
"""Elements of which each of three threads has a slice."""
SIZES = [
    *((numel, 1) for numel in (0, 1, 7, 15, 16, 17, 1000)),
    *((numel, threads) for numel in (2 * LEAST - 1, 2 * LEAST) for threads in (1, 2)),
    *((LARGE, threads) for threads in (1, 2, 3)),
]
"""(elements, threads): around the width of vector instructions, and where another thread is given a slice."""


def random_vector(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


class Stretch:
    """Elements `begin` to `end` of a run whose param groups alternate, stepped as in a shard."""

    def __init__(self, form: str, weights: Tensor, begin: int, end: int) -> None:
        chosen = hyperparameters(form)
        self.begin, self.end, self.method = begin, end, method_of(chosen)
        numel = weights.numel()
        edges = sorted({0, numel // 3, numel // 2 + 1, min(numel // 2 + 4, numel), numel} & set(range(numel + 1)))
        self.layout = [
            Segment(group, max(first, begin) - begin, min(last, end) - begin)
            for (first, last), group in zip(itertools.pairwise(edges), itertools.cycle(("even", "odd")))
            if max(first, begin) < min(last, end)
        ]
        self.hyperparameters = {"even": chosen, "odd": chosen.overruled(own(form, lr=0.1, weight_decay=0.3))}
        self.buffers = initial_buffers(self.method, weights[begin:end].clone())
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)

    def step(self, pushed: Tensor, share: float = 1.0, gathered: Tensor | None = None) -> None:
        part = slice(self.begin, self.end)
        gradient = Gradient(pushed[part], 0.3, share, None if gathered is None else gathered[part])
        self.scalars = step(
            self.method,
            self.layout,
            self.hyperparameters,
            self.scalars,
            self.buffers,
            gradient,
            Conditions(0.7, expected_staleness=3.0),
        )

    def point(self, name: str, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.end - self.begin, dtype=dtype)
        interpolate(self.method, self.layout, self.hyperparameters, self.scalars, self.buffers, name, out)  # type: ignore[arg-type]
        return out
