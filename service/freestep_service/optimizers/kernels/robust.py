"""Robust means of vectors, of which some may be anything: by coordinate, and by the distances between the vectors.

On the host each is one pass over memory, compiled; on a GPU torch does it, in parts. Vectors are rows of a matrix.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freestep_service.optimizers.kernels.compiled import compiled, is_compiled
from freestep_service.optimizers.kernels.slices import in_slices

__all__ = ["square_distances", "trimmed_mean"]

CHUNK = 512
"""Elements of each vector that are sorted at a time: few enough to stay in the processor's first cache."""
BLOCK = 64 * 1024
"""Elements over which squares are summed up before the sums are added in order, whatever the number of threads."""
PIECE = 4 * 1024 * 1024
"""Elements of each vector that torch processes at a time."""


def trimmed_mean(rows: Tensor, trimmed: int) -> Tensor:
    """The mean of each column of `rows`, fp32 [n, numel], without its `trimmed` smallest and largest values.

    2 · trimmed < n. Returns it, [numel], in the memory of the first row; an element does not depend on where it stands.
    """
    count = len(rows)
    assert 0 <= 2 * trimmed < count, "a value has to be left"
    if is_compiled(rows):
        network, share = _sorting_network(count), np.float32(1 / (count - 2 * trimmed))
        array = rows.numpy()
        in_slices(lambda begin, end: _trimmed_mean(array, begin, end, network, trimmed, share), rows.shape[1])
        return rows[0]
    for begin in range(0, rows.shape[1], PIECE):
        part = rows[:, begin : begin + PIECE]
        part[0] = part.sort(dim=0).values[trimmed : count - trimmed].mean(0)
    return rows[0]


@cache
def _sorting_network(count: int) -> Any:
    """The comparisons, int64 [c, 2], that sort so many values: Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2 M)."""
    top = 1 << max(count - 1, 1).bit_length() - 1
    found, p = [], top
    while p:
        q, r, d = top, 0, p
        while True:
            found += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return np.array(found, np.int64).reshape(-1, 2)


def _trimmed_mean_loop(rows: Any, first: Any, last: Any, network: Any, trimmed: Any, share: Any) -> None:
    count = len(rows)
    chunk = np.empty((count, CHUNK), np.float32)
    for begin in range(first, last, CHUNK):
        width = min(CHUNK, last - begin)
        for row in range(count):
            source, place = rows[row, begin : begin + width], chunk[row]
            for i in range(width):
                place[i] = source[i]
        for pair in range(len(network)):
            low, high = chunk[network[pair, 0]], chunk[network[pair, 1]]
            for i in range(width):
                x, y = low[i], high[i]
                low[i] = x if x < y else y
                high[i] = y if x < y else x
        total = chunk[trimmed]
        for row in range(trimmed + 1, count - trimmed):
            more = chunk[row]
            for i in range(width):
                total[i] += more[i]
        out = rows[0, begin : begin + width]
        for i in range(width):
            out[i] = total[i] * share


_trimmed_mean = compiled(_trimmed_mean_loop)


def square_distances(rows: Tensor) -> Tensor:
    """The squares of the 2-norms of the differences between the rows of fp32 [n, numel], fp64 on the host.

    They are those of rows (0, 1), (0, 2), ..., (1, 2), ...: [n · (n - 1) / 2]. Of rows that are cut into parts, the sum
    over the parts is that of the whole rows, but for rounding.
    """
    count, numel = rows.shape
    if not is_compiled(rows):
        totals = torch.zeros(count * (count - 1) // 2, dtype=torch.float64, device=rows.device)
        for begin in range(0, numel, PIECE):
            part = rows[:, begin : begin + PIECE]
            for place, (i, j) in enumerate(combinations(range(count), 2)):
                totals[place] += torch.linalg.vector_norm(part[i] - part[j], dtype=torch.float64).square()
        return totals.cpu()
    sums = np.zeros((-(-numel // BLOCK), count * (count - 1) // 2))
    array = rows.numpy()

    def work(begin: int, end: int) -> None:
        # A block belongs to the slice in which it begins.
        for block in range(-(-begin // BLOCK), -(-end // BLOCK)):
            _distances(array, block * BLOCK, min((block + 1) * BLOCK, numel), sums[block])

    in_slices(work, numel)
    return torch.tensor([sum(column.tolist()) for column in sums.T], dtype=torch.float64, device="cpu")


def _distances_loop(rows: Any, first: Any, last: Any, sums: Any) -> None:
    count = len(rows)
    chunk = np.empty((count, CHUNK), np.float64)
    for begin in range(first, last, CHUNK):
        width, pair = min(CHUNK, last - begin), 0
        for row in range(count):
            source, place = rows[row, begin : begin + width], chunk[row]
            for i in range(width):
                place[i] = source[i]
        for one in range(count):
            for other in range(one + 1, count):
                a, b, total = chunk[one], chunk[other], 0.0
                for i in range(width):
                    x = a[i] - b[i]
                    total += x * x
                sums[pair] += total
                pair += 1


_distances = compiled(_distances_loop, reassociate=True)
