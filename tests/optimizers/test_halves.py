"""BF16 and F16 as their 16 bits: conversion to and from fp32 equals torch's for all numbers."""

from __future__ import annotations

import math

import pytest
import torch

from freestep.api.hyperparameters import SGD
from freestep_service.optimizers import (
    Segment,
    interpolate,
    method_of,
    widen,
)

EDGES = torch.tensor(
    [
        *(
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            -math.nan,
            3.4028235e38,
            -3.4028235e38,
            1e-45,
            -1e-45,
            1.1754944e-38,
        ),
        # The largest of F16 and BF16, what is just rounded to it, and what is just not.
        *(65504.0, 65519.996, 65520.0, -65520.0, 3.3895314e38, 3.3961775e38, 3.3961776e38),
        # F16's subnormals: the smallest, its half, which ties to 0, just above it, and where they end.
        *(5.9604645e-08, 2.9802322e-08, 2.9802326e-08, 6.1035156e-05, 6.097555e-05, 6.1005354e-05),
    ]
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_are_rounded_as_by_torch(dtype: torch.dtype, threads: int) -> None:
    every_half = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    bits = every_half.view(torch.int32)
    # Both neighbours of each number that 16 bits can hold, and of what lies halfway to the next.
    halfway = 2**15 if dtype == torch.bfloat16 else 2**12
    near = [(bits + offset).view(torch.float32) for offset in (-1, 1, halfway - 1, halfway, halfway + 1)]
    anywhere = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    y = torch.cat([EDGES, every_half, *near, anywhere.to(torch.int32).view(torch.float32)])
    out = torch.empty(y.numel(), dtype=dtype)
    interpolate(method_of(SGD()), [Segment("", 0, y.numel())], {"": SGD()}, {"": {}}, {"y": y}, "y", out)
    assert torch.equal(out.isnan(), y.isnan())
    number = ~y.isnan()
    assert torch.equal(out.view(torch.int16)[number], y.to(dtype).view(torch.int16)[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_converted_to_fp32_as_by_torch(dtype: torch.dtype) -> None:
    halves = torch.arange(2**16).to(torch.uint16).view(dtype)
    out = torch.empty(halves.numel())
    assert not math.isfinite(widen(halves, out))
    assert torch.equal(out.isnan(), halves.isnan())
    number = ~halves.isnan()
    assert torch.equal(out.view(torch.int32)[number], halves.float().view(torch.int32)[number])
