"""A run from its first step to its last, with a look at x on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from examples.lab.local import LocalRun
from examples.lab.problems import Problem

__all__ = ["batches", "checkpoints", "train"]


def batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end: all samples in a new random order, again and again; a rest is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from torch.split(order[: samples - samples % size], size)


def checkpoints(steps: int, count: int, first: int = 10) -> list[int]:
    """About so many steps to look at, the same distance apart on a logarithmic axis; the last is `steps`."""
    ratio = (steps / first) ** (1 / (count - 1)) if count > 1 else 1.0
    return sorted({round(first * ratio**number) for number in range(count)} | {steps})


def train(
    problem: Problem, optimizer: Mapping[str, Any], steps: int, batch: int, seed: int, looks: Collection[int]
) -> dict[str, Any]:
    """Trains, and evaluates x after the steps in `looks` and after the last.

    Returns the last step's figures, and `curve`: those of all looks, each with its `step`. A run whose loss is no
    number any more ends there; its figures are None.
    """
    run = LocalRun(optimizer, problem.initial(seed))
    order = batches(problem.samples, batch, seed)
    y, x = torch.empty(problem.numel), torch.empty(problem.numel)
    curve: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        run.push(problem.gradient(run.point("y", y), next(order)))
        if step in looks or step == steps:
            seen = problem.evaluate(run.point("x", x))
            if not isfinite(seen["train_loss"]):
                return {**dict.fromkeys(seen), "curve": curve}
            curve.append({"step": step, **seen})
    return {**seen, "curve": curve}
