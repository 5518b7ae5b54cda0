"""A job of DDP under torchrun, which starts all ranks again when one has ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["ENVIRONMENT", "arguments", "kill_rank", "write_rank"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""By default torchrun keeps one store for all starts of the ranks (torch 2.13). There gloo finds the addresses of ranks
that have ended, and no start but the first succeeds, or only by chance (github.com/pytorch/pytorch/issues/135712). So
each start has a store of its own."""


def arguments(ranks: int, module: str, given: Sequence[str]) -> list[str]:
    """The interpreter's arguments that start torchrun, and it a module with these arguments as each rank."""
    launch = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "100000", "--monitor-interval", "0.1"]
    return ["-m", "torch.distributed.run", *launch, "-m", module, *given]


def write_rank(folder: Path) -> int:
    """A rank's first act: says in the folder which process it is; returns its number."""
    rank = int(os.environ["RANK"])
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    return rank


def kill_rank(folder: Path, rank: int) -> None:
    """SIGKILL."""
    # Between two starts of the job there is no such process, and the kill finds none.
    with suppress(ProcessLookupError):
        os.kill(int((folder / f"rank-{rank}.pid").read_text()), signal.SIGKILL)
