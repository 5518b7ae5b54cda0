"""Copies on the host are torch's own, made by the calling thread alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from freestep.host_copies import copy_on_host

SHAPES = [(), (0,), (7,), (31 * 1024,), (31 * 1024 + 1,), (300, 401), (5, 40_000), (2, 3, 70_001), (64, 64, 3, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
    "parameter": lambda tensor: nn.Parameter(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_is_torchs(layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=generator) for shape in SHAPES]
    targets = [LAYOUTS[layout](torch.full(shape, torch.nan, dtype=dtype)) for shape in SHAPES]
    expected = [target.detach().clone() for target in targets]
    versions = [target._version for target in targets]
    with torch.no_grad():
        copy_on_host(targets, sources)
        copy_on_host([torch.empty(shape) for shape in SHAPES], targets)
        for target, source in zip(expected, sources, strict=True):
            target.copy_(source)
    for target, wanted, version in zip(targets, expected, versions, strict=True):
        assert target.equal(wanted)
        # As autograd notices a tensor that was changed after it had been saved for a backward pass.
        assert target._version > version


def test_a_change_of_what_backward_needs_is_noticed() -> None:
    weight = torch.ones(100_000, requires_grad=True)
    product = weight * weight
    with torch.no_grad():
        copy_on_host([weight], [torch.zeros(100_000)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("other", [torch.conj, torch._neg_view])
def test_views_whose_memory_has_other_values_are_copied_by_value(other: Callable[[Tensor], Tensor]) -> None:
    source = torch.randn(100_000, dtype=torch.complex64)
    target = torch.zeros_like(source)
    copy_on_host([target], [other(source)])
    assert target.equal(other(source).resolve_conj().resolve_neg())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are told apart on Linux only")
def test_no_other_thread_is_woken() -> None:
    program = """
import os, time, torch
from freestep.host_copies import copy_on_host

def others():
    # How often each of the process's other threads has gone to sleep so far, once all of them sleep.
    while True:
        counts, asleep = {}, True
        for thread in set(os.listdir("/proc/self/task")) - {str(os.getpid())}:
            lines = dict(line.split(":", 1) for line in open(f"/proc/self/task/{thread}/status"))
            asleep &= lines["State"].split()[0] == "S"
            counts[thread] = int(lines["voluntary_ctxt_switches"])
        if asleep:
            return counts

torch.set_num_threads(2)
same, copy = torch.randn(2, 2_000_000)
other = torch.zeros(2_000_000, dtype=torch.bfloat16)
before = others()
assert before, "torch has no threads to wake"
for _ in range(10):
    copy_on_host([copy, other, other.view(2, -1).t()], [same, same, same.view(2, -1).t()])
assert others() == before
torch.zeros(2_000_000)
assert others() != before, "a thread that is woken is not seen"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
