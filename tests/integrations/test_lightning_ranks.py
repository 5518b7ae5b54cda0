"""Lightning's DistributedDataParallel: its ranks are one worker, which takes one step for their mean gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from freestep import Run
from harness import ThreadService
from lightning_module import by_the_package, weights
from ranks import run_ranks
from trained import held, pulled

pytestmark = pytest.mark.slow

RANK = Path(__file__).with_name("lightning_rank.py")


def test_ranks_are_one_worker(service: ThreadService, run: Run, name: str, tmp_path: Path) -> None:
    run_ranks(RANK, service.url, name, str(tmp_path), called=["LOCAL_RANK"], NODE_RANK="0")
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    status = run.status()
    # 64 samples are 4 batches of 8 for each rank.
    assert (status.step, status.pushes["applied"]) == (8, 8)
    assert run.workers() == []
    expected, _ = by_the_package(2, size=16)
    torch.testing.assert_close(first["weights"], held(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(first["weights"], pulled(run, "x"))
    assert torch.equal(first["weights"], second["weights"])
    for each in (first, second):
        torch.testing.assert_close(each["fabric"], held(expected), rtol=1e-4, atol=1e-5)
        assert (set(each["stages"]["train"]), set(each["stages"]["validate"])) == ({"y"}, {"x"})
    assert [path.name for path in sorted(tmp_path.glob("every*"))] == [
        f"every-step={step}.ckpt" for step in (2, 4, 6, 8)
    ]
    assert torch.equal(weights(tmp_path / "every-step=8.ckpt"), pulled(run, "x"))
    assert torch.equal(weights(tmp_path / "best-step=8.ckpt"), pulled(run, "x"))
