"""Spreads a pass over vectors on the host over threads, a slice for each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

__all__ = ["in_slices"]

T = TypeVar("T")

MIN_SLICE = 128 * 1024
"""Elements of a slice at least: passing fewer to another thread takes longer than the pass itself."""


def in_slices(work: Callable[[int, int], T], numel: int) -> list[T]:
    """Calls `work(begin, end)` for slices that make up elements 0 to `numel`; returns the results in order.

    There are at most `torch.get_num_threads()` slices. They run at the same time as far as `work` releases the GIL, in
    threads that sleep between calls, where OpenMP's would spin.
    """
    count = max(1, min(torch.get_num_threads(), numel // MIN_SLICE))
    if count == 1:
        return [work(0, numel)]
    bounds = [numel * number // count for number in range(count + 1)]
    helpers = _helpers(count - 1)
    others = [helpers.submit(work, bounds[number], bounds[number + 1]) for number in range(1, count)]
    first = work(0, bounds[1])
    return [first, *(other.result() for other in others)]


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "freestep-slices")
