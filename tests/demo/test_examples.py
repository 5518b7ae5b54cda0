"""The examples, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from freestep import Client
from harness import ProcessService

pytestmark = [pytest.mark.slow, pytest.mark.evidence]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TORCHRUN, EVALUATOR = EXAMPLES / "train_torchrun.py", EXAMPLES / "evaluate_mnist.py"


def output_of(*command: object, url: str, folder: Path) -> str:
    """What a Python program prints that runs in a folder."""
    environment = {**os.environ, "FREESTEP_URL": url}
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=folder, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "example", sorted({*EXAMPLES.glob("*.py")} - {TORCHRUN, EVALUATOR}), ids=lambda path: path.stem
)
def test_an_example_runs(start_process: Callable[..., ProcessService], example: Path, tmp_path: Path) -> None:
    assert "%" in output_of(example, url=start_process().url, folder=tmp_path)


def test_an_evaluator_keeps_the_best(start_process: Callable[..., ProcessService], tmp_path: Path) -> None:
    url = start_process().url
    output_of(EXAMPLES / "train_mnist.py", url=url, folder=tmp_path)
    said = output_of(EVALUATOR, url=url, folder=tmp_path).splitlines()[-1]
    kept = tmp_path / "best.safetensors"
    with Client(url) as client, safetensors.safe_open(kept, framework="pt") as opened:
        metric, metadata = client.run("mnist").status().metrics["accuracy"], opened.metadata()
        x, step = client.run("mnist").pull("x")
    assert (float(metadata["freestep.value"]), int(metadata["freestep.step"])) == (metric.value, step)
    assert metric.value >= 0.95
    assert said == f"step {step}: x has {metric.value:.1%} test accuracy, the best so far"
    loaded = safetensors.torch.load_file(kept)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in x.items())
    again = output_of(
        "-m", "freestep.cli", "evaluate", "mnist", f"{EVALUATOR}:accuracy", "--once", url=url, folder=tmp_path
    )
    assert again == f"step {step}: accuracy {metric.value:.4g}\n"


def torchrun(ranks: int, url: str, save: Path, *arguments: str) -> tuple[float, float, list[dict[str, Tensor]]]:
    """Runs the example; returns its first and final loss, and each rank's parameters."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(TORCHRUN), "--url", url, "--save", str(save), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    first, last = (re.search(f"{words}: (.*)", done.stdout) for words in ("loss at first", "final loss"))
    assert first and last, done.stdout
    return float(first[1]), float(last[1]), [torch.load(f"{save}.{rank}") for rank in range(ranks)]


def test_the_ranks_of_a_torchrun_group_are_one_worker(
    start_process: Callable[..., ProcessService], tmp_path: Path
) -> None:
    url = start_process().url
    # Shares of unequal size, so that their weights matter.
    first, last, (one, other) = torchrun(2, url, tmp_path / "two", "--name", "two", "--batch", "65")
    assert last < first / 2
    assert all(torch.equal(one[name], other[name]) for name in one)
    _, _, (alone,) = torchrun(1, url, tmp_path / "alone", "--name", "alone", "--batch", "65")
    for name, tensor in alone.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4)
    with Client(url) as client:
        for name in ("two", "alone"):
            status = client.run(name).status()
            assert (status.step, status.shards, status.pushes["applied"]) == (100, 2, 100)
