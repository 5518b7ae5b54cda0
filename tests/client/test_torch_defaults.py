"""The client under default devices and dtypes of torch other than its own, which belong to the user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freestep import Client, LocalSteps, RemoteOptimizer
from harness import ThreadService
from meanwhile import DEADLINE_S
from trained import held, network

ROOT = Path(__file__).parent.parent.parent
DEFAULTS = ["meta", torch.float64, torch.bfloat16]
FORMATS: list[dict[str, Any]] = [
    {},
    {"push_dtype": "BF16", "pull_dtype": "BF16"},
    {"push_dtype": "F16", "error_feedback": False, "pull_dtype": "F16"},
    {"push_encoding": "int8", "pull_dtype": "I8"},
    {"push_encoding": "topk", "topk_fraction": 0.5, "shards": 2},
]


@contextmanager
def torch_default(default: str | torch.dtype) -> Iterator[None]:
    if isinstance(default, str):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def inputs(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=generator, dtype=torch.float32, device="cpu")


def train(optimizer: RemoteOptimizer, model: torch.nn.Module, **options: Any) -> list[Tensor]:
    """Some steps; what the model holds after each, and x at the end."""
    seen = []
    for number in range(3):
        optimizer.zero_grad()
        loss = model(inputs(number)).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach(), **options)
        seen.append(held(model))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.eval()
    return [*seen, held(model)]


@pytest.fixture(params=DEFAULTS, ids=str)
def default(request: pytest.FixtureRequest) -> str | torch.dtype:
    chosen: str | torch.dtype = request.param
    return chosen


def assert_same(train: Callable[[torch.nn.Module], list[Tensor]], default: str | torch.dtype) -> None:
    """The same model trains to the same bits with the default and without it."""
    first, second = network(), network()
    expected = train(first)
    with torch_default(default):
        found = train(second)
    assert all(each.dtype == torch.float32 and each.device.type == "cpu" for each in found)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(map(str, options.values())) or "F32")
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_an_optimizer_trains_as_without_it(
    service: ThreadService, default: str | torch.dtype, options: dict[str, Any], overlap: bool
) -> None:
    def remotely(model: torch.nn.Module) -> list[Tensor]:
        run = f"run-{uuid.uuid4().hex[:8]}"
        with RemoteOptimizer(model, url=service.url, run=run, aggregation="async", lr=0.1, **options) as optimizer:
            return train(optimizer, model, overlap=overlap)

    assert_same(remotely, default)


@pytest.mark.parametrize("algorithm", ["adamw_schedule_free", "adamc_schedule_free_plus", "schedule_free_wrapper"])
def test_a_run_in_the_process_trains_as_without_it(default: str | torch.dtype, algorithm: str) -> None:
    def at_home(model: torch.nn.Module) -> list[Tensor]:
        options = {"base": {"algorithm": "adamw"}} if algorithm == "schedule_free_wrapper" else {}
        with RemoteOptimizer(model, url="local", algorithm=algorithm, push_encoding="int8", **options) as optimizer:
            return train(optimizer, model)

    assert_same(at_home, default)


def test_local_steps_train_as_without_it(service: ThreadService, default: str | torch.dtype) -> None:
    def locally(model: torch.nn.Module) -> list[Tensor]:
        run, inner = f"run-{uuid.uuid4().hex[:8]}", torch.optim.SGD(model.parameters(), lr=0.1)
        with LocalSteps(model, inner, every=2, url=service.url, run=run, push_encoding="int8") as optimizer:
            return train(optimizer, model)

    assert_same(locally, default)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "I8"])
def test_points_are_pulled_as_without_it(service: ThreadService, default: str | torch.dtype, dtype: str) -> None:
    name, weights = f"run-{uuid.uuid4().hex[:8]}", inputs(0)
    spec = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": list(weights.shape)}]}
    with Client(service.url) as client:
        run = client.run(name)
        with torch_default(default):
            run.create(spec)
            run.initialize({"w": weights})
            with run.lease() as lease:
                run.push({"w": weights}, lease.claim(0))
            found = {point: run.pull(point, dtype=dtype)[0]["w"] for point in ("x", "y")}  # type: ignore[arg-type]
        for point, tensor in found.items():
            assert torch.equal(tensor, run.pull(point, dtype=dtype)[0]["w"])  # type: ignore[arg-type]
            torch.testing.assert_close(tensor.float(), weights - 1e-3 * weights, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.timeout(10 * DEADLINE_S)
def test_the_tests_of_the_client_pass_within_a_default_device() -> None:
    # In one process: each spends seconds of CPU on its imports.
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("optimizer", "rejoining", "encoders", "client")]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "under_meta", "-m", "not slow", *map(str, files)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    ran = [file for file in files if re.search(rf"{file.name} s*\.", done.stdout)]
    assert ran == files, done.stdout
