"""Robust rules on the pushes of an update, against slow twins that are read off their papers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freestep.api.models import AggregationSpec
from freestep_service.state.compute import HOST
from freestep_service.state.kept_pushes import KeptPushes, least_scores, trimmed_values
from krum_twin import krum_twin

STEADY = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def trimmed_twin(pushes: list[Tensor], beta: float) -> Tensor:
    """Yin et al. (arXiv 1803.01498), definition 2, a coordinate at a time."""
    count = len(pushes)
    trimmed = min(math.ceil(round(beta * count, 6)), (count - 1) // 2)
    means = []
    for values in zip(*(push.tolist() for push in pushes), strict=True):
        left = sorted(values)[trimmed : count - trimmed]
        means.append(sum(left) / len(left))
    return torch.tensor(means, dtype=torch.float64)


def median_twin(pushes: list[Tensor]) -> Tensor:
    """The same paper, definition 1: of an even number of values, the mean of the two in the middle."""
    medians = []
    for values in zip(*(push.tolist() for push in pushes), strict=True):
        ordered, middle = sorted(values), len(values) // 2
        medians.append(ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
    return torch.tensor(medians, dtype=torch.float64)


def combined(spec: AggregationSpec, pushes: list[Tensor], most: int) -> Tensor:
    kept = KeptPushes(spec, most, len(pushes[0]), HOST)
    for push in pushes:
        kept.add(push.float(), 1.0)
    gradient = kept.combine()
    assert kept.tensors() == []
    return gradient.evaluated(torch.float32).double()


@st.composite
def groups(draw: st.DrawFn) -> list[Tensor]:
    """Pushes around a direction, and some that are anything, as fp64 of fp32 values."""
    count, numel = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    direction = torch.randn(numel, generator=generator)
    factors = draw(st.lists(st.sampled_from([1.0, 1.0, 1.0, -1.0, 1000.0]), min_size=count, max_size=count))
    return [(factor * (direction + torch.randn(numel, generator=generator))).double() for factor in factors]


@STEADY
@given(pushes=groups(), beta=st.sampled_from([0.1, 0.2, 0.3, 0.49]), f=st.integers(1, 3), m=st.integers(1, 3))
def test_the_rules_equal_their_twins(pushes: list[Tensor], beta: float, f: int, m: int) -> None:
    shared: dict[str, Any] = {"policy": "sync", "max_batch": 9}
    tolerance = {"rtol": 1e-5, "atol": 1e-3}
    trimmed = AggregationSpec(robust="trimmed_mean", beta=beta, **shared)
    torch.testing.assert_close(combined(trimmed, pushes, 9), trimmed_twin(pushes, beta), **tolerance)
    median = AggregationSpec(robust="coordinate_median", **shared)
    torch.testing.assert_close(combined(median, pushes, 9), median_twin(pushes), **tolerance)
    krum = AggregationSpec(robust="krum", f=f, m=m, **shared)
    torch.testing.assert_close(combined(krum, pushes, 9), krum_twin(pushes, f, m), **tolerance)


@pytest.mark.parametrize("beta", [0.1, 0.2, 0.25, 0.3, 0.45])
def test_what_is_trimmed_withstands_the_fraction(beta: float) -> None:
    for count in range(1, 101):
        trimmed = trimmed_values(beta, count)
        assert math.floor(round(beta * count, 6)) <= trimmed <= math.ceil(round(beta * count, 6))
        assert 2 * trimmed < count


def test_of_equal_scores_the_first_is_taken() -> None:
    assert least_scores(torch.zeros(10, dtype=torch.float64), 5, 1, 1) == [0]
    assert least_scores(torch.zeros(10, dtype=torch.float64), 5, 1, 3) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_krum_of_too_few_pushes_takes_one_of_them(count: int) -> None:
    pushes = [torch.full((4,), float(number)).double() for number in range(count)]
    spec = AggregationSpec(policy="sync", max_batch=9, robust="krum", f=3)
    assert any(torch.equal(combined(spec, pushes, 9), push) for push in pushes)


def test_pushes_in_another_order_make_the_same_gradient_where_no_scores_are_equal() -> None:
    pushes = [torch.randn(30, generator=torch.Generator().manual_seed(seed)).double() for seed in range(4)]
    spec = AggregationSpec(policy="quorum", batch=4, robust="coordinate_median")
    first, *others = (combined(spec, list(order), 4) for order in itertools.permutations(pushes))
    assert all(torch.equal(first, other) for other in others)
