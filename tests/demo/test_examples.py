"""The examples, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freestep import Client
from harness import ProcessService

pytestmark = [pytest.mark.slow, pytest.mark.evidence]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TORCHRUN = EXAMPLES / "train_torchrun.py"


@pytest.mark.parametrize("example", sorted({*EXAMPLES.glob("*.py")} - {TORCHRUN}), ids=lambda path: path.stem)
def test_an_example_runs(start_process: Callable[..., ProcessService], example: Path) -> None:
    environment = {**os.environ, "FREESTEP_URL": start_process().url}
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


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
