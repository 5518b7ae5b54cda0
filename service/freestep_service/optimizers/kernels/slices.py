"""A pass over vectors on the host, spread over threads: a slice for each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

__all__ = ["in_slices"]

T = TypeVar("T")

LEAST = 128 * 1024
"""Elements of a slice: handing over fewer takes longer than the pass itself."""


def in_slices(work: Callable[[int, int], T], numel: int) -> list[T]:
    """Calls `work(begin, end)` for slices that make up 0 to `numel`, and returns the results in their order.

    There are as many slices as the calling thread has torch spread its arithmetic over, and they are worked on at the
    same time as far as `work` lets the GIL go. The helpers wait asleep, where those of OpenMP spin.
    """
    count = max(1, min(torch.get_num_threads(), numel // LEAST))
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
