"""Robust means against plain torch in fp64, for all numbers of rows, lengths and threads."""

from __future__ import annotations

import itertools

import pytest
import torch

from freestep_service.optimizers import square_distances, trimmed_mean
from freestep_service.optimizers.kernels import robust

LENGTHS = [0, 1, 17, robust.CHUNK, robust.CHUNK + 1, 300_001]


def rows_of(count: int, numel: int) -> torch.Tensor:
    """Rows with equal values among them, and some that are far off."""
    rows = torch.randn(count, numel, generator=torch.Generator().manual_seed(count * numel + 1))
    rows[:, ::3] = rows[:, ::3].round()
    rows[0] *= 1000
    return rows


def of_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """The elements of rows and columns (0, 1), (0, 2), ..., (1, 2), ... of a matrix."""
    return matrix[*torch.triu_indices(len(matrix), len(matrix), 1)]


@pytest.mark.parametrize("count", [*range(1, 18), 33])
def test_a_trimmed_mean_is_that_of_sorted_columns(count: int) -> None:
    rows = rows_of(count, 700)
    for trimmed in range((count + 1) // 2):
        expected = rows.double().sort(dim=0).values[trimmed : count - trimmed].mean(0)
        torch.testing.assert_close(trimmed_mean(rows.clone(), trimmed).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numel", LENGTHS)
def test_a_median_is_that_of_torch(numel: int) -> None:
    rows = rows_of(5, numel)
    assert torch.equal(trimmed_mean(rows.clone(), 2), rows.median(dim=0).values)


@pytest.mark.parametrize("numel", LENGTHS)
def test_square_distances_are_those_of_torch(numel: int) -> None:
    rows = rows_of(4, numel)
    expected = (rows.double()[:, None] - rows.double()[None]).square().sum(-1)
    torch.testing.assert_close(square_distances(rows), of_pairs(expected), rtol=1e-12, atol=0.0)


def test_square_distances_of_parts_add_up_to_those_of_the_whole() -> None:
    rows = rows_of(5, 300_001)
    for ends in ([0, 1, 300_001], [0, 100_000, 100_000, 200_003, 300_001]):
        parts = [square_distances(rows[:, begin:end].contiguous()) for begin, end in itertools.pairwise(ends)]
        torch.testing.assert_close(torch.stack(parts).sum(0), square_distances(rows), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_bits_do_not_depend_on_threads_nor_on_where_an_element_stands(threads: int) -> None:
    rows = rows_of(6, 700_001)
    whole = trimmed_mean(rows.clone(), 1)
    for begin, end in ((0, 1), (1, 512), (511, 400_000), (699_000, 700_001)):
        assert torch.equal(trimmed_mean(rows[:, begin:end].contiguous(), 1), whole[begin:end])
    found = square_distances(rows)
    torch.set_num_threads(1)
    assert torch.equal(found, square_distances(rows))


def test_rows_that_are_not_compiled_for_give_the_same() -> None:
    rows = rows_of(7, 1000).double()
    expected = rows.sort(dim=0).values[2:5].mean(0)
    torch.testing.assert_close(trimmed_mean(rows.clone(), 2), expected)
    differences = (rows[:, None] - rows[None]).square().sum(-1)
    torch.testing.assert_close(square_distances(rows), of_pairs(differences))
