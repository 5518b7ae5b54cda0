"""A rank of the DDP job, under torchrun: `ddp.py DATA LEDGER CHECKPOINT SECONDS STOP`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.goodput.ledger import APPLIED, COMPUTED, Ledger
from benchmarks.goodput.torchrun import write_rank
from benchmarks.goodput.training import LR, batches, model

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(file: Path, net: nn.Module, optimizer: Any, step: int) -> None:
    """Written whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def load_checkpoint(file: Path, net: nn.Module, optimizer: Any) -> int:
    """The step that the job goes on from."""
    if not file.exists():
        return 0
    saved = torch.load(file)
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def main(data: str, ledger_file: str, checkpoint: str, seconds: float, stop: str) -> None:
    rank, file = write_rank(Path(stop).parent), Path(checkpoint)
    distributed.init_process_group("gloo")
    net, ledger = model(), Ledger(Path(ledger_file))
    optimizer = AdamWScheduleFree(net.parameters(), lr=LR)
    step = load_checkpoint(file, net, optimizer)
    optimizer.train()
    replicas = DistributedDataParallel(net)
    saved = time.monotonic()
    for images, labels in batches(Path(data)):
        optimizer.zero_grad()
        # All ranks end after the same step: rank 0's word travels with it.
        ends = torch.tensor(float(rank == 0 and Path(stop).exists()))
        loss = cross_entropy(replicas(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        computed = ledger.append(COMPUTED, rank, step)
        distributed.all_reduce(ends)
        optimizer.step()
        step += 1
        ledger.append(APPLIED, rank, step, computed)
        if rank == 0 and (ends > 0 or time.monotonic() - saved >= seconds):
            save_checkpoint(file, net, optimizer, step)
            saved = time.monotonic()
        if ends > 0:
            break
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
