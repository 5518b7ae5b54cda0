"""Rules as kernels, which torch.compile makes, tried on the host.

A GPU is not needed for this: that a rule is traced as a whole, and not again at every step, does not depend on what
the trace is then compiled to.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics

from forms import FORMS, own
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Conditions, Gradient, gather, initial_buffers, method_of, segments, step
from freestep_service.optimizers.kernels import fused, sweep
from freestep_service.optimizers.readiness import compile_kernels

STEPS = 12
"""Enough for RAdam to divide by the root of v."""
ALL = {
    **FORMS,
    "sgd-nesterov": {**FORMS["sgd"], "momentum": 0.9, "nesterov": True},
    "adamc_schedule_free_plus": {"algorithm": "adamc_schedule_free_plus"},
}
ALIGNED = (200, 100)
UNALIGNED = (200, 1, 199, 100)
"""Lengths of stretches of two groups in turn: one begins where vectors are not aligned, one has a single element."""
CASES = [*[(form, ALIGNED) for form in ALL], *[(form, UNALIGNED) for form in ("sgd", "radam_schedule_free")]]
FEW = ("sgd", "radam_schedule_free", "adamw-ema", "schedule_free_wrapper-rprop")
SIZE = 5000


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All vectors are left to torch, and kernels are traced, but run operation by operation."""
    monkeypatch.setattr(sweep, "is_compiled", lambda vector: False)
    monkeypatch.setattr(fused, "BACKEND", "eager")
    monkeypatch.setattr(fused, "_TRIAL", 1024)
    fused._kernel.cache_clear()
    yield
    fused._kernel.cache_clear()


class Run:
    """A method's state and groups; all runs have the same weights and gradients."""

    def __init__(self, form: str, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        spec = RunSpec.model_validate(
            {
                "optimizer": ALL[form],
                "parameters": [
                    {"name": f"{number}", "shape": [length], "group": "ab"[number % 2]}
                    for number, length in enumerate(lengths)
                ],
                "groups": {"a": {}, "b": own(form, lr=0.1, weight_decay=0.3)},
            }
        )
        self.method = method_of(spec.optimizer)
        self.layout = segments(Manifest(spec.parameters).slots)
        self.hyperparameters = {group: spec.hyperparameters(group) for group in "ab"}
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)
        self._generator = torch.Generator().manual_seed(0)
        self._size, self._dtype = sum(lengths), dtype
        self.buffers = initial_buffers(self.method, self._random())

    def _random(self) -> Tensor:
        return torch.randn(self._size, generator=self._generator).to(self._dtype)

    def prepare(self) -> None:
        """Compiles what the service compiles when it loads a run."""
        compile_kernels(self.method, self.layout, self.hyperparameters, torch.device("cpu"), gathers=True)

    def steps(self) -> None:
        """Along pushes, and along means of groups in turn."""
        for number in range(STEPS):
            gathered = self._random() if number % 2 else None
            gradient = Gradient(self._random(), 1 / (1 + number), 0.7, gathered)
            taken = Conditions(damping=1 - number / STEPS, expected_staleness=number % 3, loss=1.0)
            self.scalars = step(
                self.method, self.layout, self.hyperparameters, self.scalars, self.buffers, gradient, taken
            )


def graphs() -> int:
    """The number of graphs that torch.compile has made."""
    return int(counters["stats"]["unique_graphs"])


def made() -> int:
    """The number of kernels that this test has made."""
    return fused._kernel.cache_info().currsize


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that were logged."""
    return [record.getMessage() for record in caplog.records if record.name == "freestep"]


@pytest.mark.parametrize(("form", "lengths"), CASES)
def test_kernels_compiled_when_a_run_is_loaded_serve_every_step(
    form: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit: run operation by operation, nothing is contracted."""
    kernels, plain = (Run(form, lengths) for _ in range(2))
    before = graphs()
    kernels.prepare()
    count = made()
    assert graphs() - before == count > 0
    assert not messages(caplog)
    kernels.steps()
    assert graphs() - before == made() == count
    monkeypatch.setattr(sweep, "apply_kernel", lambda *given: False)
    plain.steps()
    for name, buffer in plain.buffers.items():
        assert torch.equal(kernels.buffers[name], buffer)


def test_kernels_that_gather_are_compiled_when_a_run_is_loaded() -> None:
    Run("sgd", ALIGNED).prepare()
    before, kernels = graphs(), made()
    accumulated = torch.empty(SIZE)
    for number in range(3):
        gather(accumulated, torch.ones(SIZE), 0.5 + number, first=not number)
    assert torch.equal(accumulated, torch.full((SIZE,), 4.5))
    assert graphs() == before
    assert made() == kernels


def test_lengths_and_offsets_need_no_other_kernels() -> None:
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


def test_a_launch_is_short_enough_for_32_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MAX_LAUNCH", 999)
    accumulated, gradient = torch.zeros(SIZE), torch.arange(float(SIZE))
    gather(accumulated, gradient, 2.0, first=True)
    assert torch.equal(accumulated, 2 * gradient)


def test_a_rule_that_cannot_be_compiled_is_evaluated_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "BACKEND", "no such compiler")
    run, exact = (Run("adamw_schedule_free", UNALIGNED, dtype) for dtype in (torch.float32, torch.float64))
    with caplog.at_level(logging.WARNING, "freestep"):
        run.steps()
    assert len(messages(caplog)) == made() > 0
    assert all(
        "._adam is not compiled for cpu but evaluated operation by operation" in each for each in messages(caplog)
    )
    exact.steps()
    for name, buffer in exact.buffers.items():
        torch.testing.assert_close(run.buffers[name], buffer.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports warn
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the host")
@pytest.mark.parametrize("form", FEW)
def test_inductor_compiles_a_rule_into_one_loop(
    form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "BACKEND", "inductor")
    run, exact = (Run(form, UNALIGNED, dtype) for dtype in (torch.float32, torch.float64))
    before = metrics.generated_kernel_count
    run.steps()
    exact.steps()
    assert metrics.generated_kernel_count - before == made() > 0
    assert not messages(caplog)
    for name, buffer in exact.buffers.items():
        torch.testing.assert_close(run.buffers[name], buffer.float(), rtol=1e-5, atol=1e-6)
