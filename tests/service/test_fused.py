"""Rules as kernels: what torch.compile makes of them, tried on the host.

A GPU is not needed for this: that a rule is traced as a whole, and not again at every step, does not depend on what
the trace is then compiled to.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics

from freestep.models import ALGORITHMS
from freestep_service.optimizers import METHODS, Segment, fused, gather, initial_buffers, readiness, step, sweep
from freestep_service.optimizers.readiness import compile_kernels

STEPS = 12
"""By then RAdam divides by the root of v."""
SIZE = 5000
LAYOUT = [Segment("a", 0, 2000), Segment("b", 2000, 2001), Segment("a", 2001, 4000), Segment("b", 4000, SIZE)]
"""Segments that are aligned and that are not, and one of a single element."""
OPTIONS: dict[str, list[dict[str, Any]]] = {"sgd": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]}
CASES = [(algorithm, options) for algorithm in METHODS for options in OPTIONS.get(algorithm, [{}])]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is for torch, and kernels are traced, and run operation by operation."""
    for module in (sweep, readiness):
        monkeypatch.setattr(module, "is_compiled", lambda vector: False)
    monkeypatch.setattr(fused, "BACKEND", "aot_eager")
    fused._kernel.cache_clear()
    yield
    fused._kernel.cache_clear()


class Run:
    """A method's state and groups, from the same weights and along the same gradients each time."""

    def __init__(self, algorithm: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        kind = ALGORITHMS[algorithm]
        self.method = METHODS[algorithm]
        self.hyperparameters = {"a": kind(lr=0.01, **options), "b": kind(lr=0.1, weight_decay=0.3, **options)}
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)
        self._generator = torch.Generator().manual_seed(0)
        self._dtype = dtype
        self.buffers = initial_buffers(self.method, self._random())

    def _random(self) -> Tensor:
        return torch.randn(SIZE, generator=self._generator).to(self._dtype)

    def steps(self, count: int = STEPS) -> None:
        for number in range(count):
            self.scalars = step(
                self.method,
                LAYOUT,
                self.hyperparameters,
                self.scalars,
                self.buffers,
                self._random(),
                scale=1 / (1 + number),
                damping=1 - number / STEPS,
            )


def graphs() -> int:
    """How many graphs torch.compile has made so far."""
    return int(counters["stats"]["unique_graphs"])


def made() -> int:
    """How many kernels there are, in this test."""
    return fused._kernel.cache_info().currsize


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the service has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "freestep"]


@pytest.mark.parametrize(("algorithm", "options"), CASES)
def test_a_kernel_is_the_rule(
    algorithm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each operation is rounded as torch rounds it by itself, where nothing contracts them."""
    kernels, plain = (Run(algorithm, options) for _ in range(2))
    before = graphs()
    kernels.steps()
    assert graphs() - before == made() > 0
    assert not said(caplog)
    monkeypatch.setattr(sweep, "fuse", lambda *given: False)
    plain.steps()
    for name, buffer in plain.buffers.items():
        assert torch.equal(kernels.buffers[name], buffer)


@pytest.mark.parametrize(("algorithm", "options"), CASES)
def test_what_is_compiled_when_a_run_is_loaded_serves_all_its_steps(algorithm: str, options: dict[str, Any]) -> None:
    run = Run(algorithm, options)
    compile_kernels(run.method, LAYOUT, run.hyperparameters, torch.device("cpu"), gathers=True)
    before, kernels = graphs(), made()
    run.steps()
    accumulated = torch.empty(SIZE)
    for number in range(3):
        gather(accumulated, torch.ones(SIZE), 0.5 + number, first=not number)
    assert torch.equal(accumulated, torch.full((SIZE,), 4.5))
    assert graphs() == before
    assert made() == kernels


def test_lengths_and_places_make_no_other_kernels() -> None:
    before = graphs()
    accumulated, gradient = torch.zeros(SIZE), torch.arange(float(SIZE))
    for begin, length in itertools.product((0, 4, 8, 4000), (2, 3, 7, 999, 1000)):
        part = slice(begin, begin + length)
        gather(accumulated[part], gradient[part], 2.0, first=True)
        assert torch.equal(accumulated[part], 2 * gradient[part])
    assert graphs() - before == made() == 1
    gather(accumulated[1:], gradient[1:], 2.0, first=True)
    gather(accumulated[3:77], gradient[3:77], 2.0, first=True)
    assert graphs() - before == made() == 2


def test_a_launch_is_not_longer_than_32_bits_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MOST", 999)
    accumulated, gradient = torch.zeros(SIZE), torch.arange(float(SIZE))
    gather(accumulated, gradient, 2.0, first=True)
    assert torch.equal(accumulated, 2 * gradient)


def test_a_rule_that_is_not_compiled_is_evaluated_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "BACKEND", "no such compiler")
    run, exact = (Run("adamw_schedule_free", {}, dtype) for dtype in (torch.float32, torch.float64))
    with caplog.at_level(logging.WARNING, "freestep"):
        run.steps()
    assert len(said(caplog)) == made() > 0
    assert all("._adam is not compiled for cpu but evaluated operation by operation" in each for each in said(caplog))
    exact.steps()
    for name, buffer in exact.buffers.items():
        torch.testing.assert_close(run.buffers[name], buffer.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports warn
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the host")
@pytest.mark.parametrize(("algorithm", "options"), CASES)
def test_inductor_makes_one_loop_of_it(
    algorithm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "BACKEND", "inductor")
    run, exact = (Run(algorithm, options, dtype) for dtype in (torch.float32, torch.float64))
    before = metrics.generated_kernel_count
    run.steps()
    exact.steps()
    assert metrics.generated_kernel_count - before == made() > 0
    assert not said(caplog)
    for name, buffer in exact.buffers.items():
        torch.testing.assert_close(run.buffers[name], buffer.float(), rtol=1e-5, atol=1e-6)
