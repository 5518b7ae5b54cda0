"""A rank of DDP: `python -m benchmarks.race.ddp_rank TOLD`; torchrun starts it again from a checkpoint."""

# DDP looks at the annotations of hooks, so they cannot be text.
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.goodput.ddp import load_checkpoint, save_checkpoint
from benchmarks.goodput.ledger import APPLIED, COMPUTED, Ledger
from benchmarks.goodput.torchrun import write_rank
from benchmarks.race.device import Device
from benchmarks.race.looks import Album, moments, x_of
from benchmarks.race.told import Told

CHECKPOINT_S = 1.0


def main() -> None:
    told = Told.parse(sys.argv[1])
    is_kept = told.method == "torchrun"
    if not is_kept:
        host, port = told.meeting.split(":")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        os.environ |= {"RANK": str(told.number), "WORLD_SIZE": str(told.workers)}
    rank = write_rank(told.place)
    told = replace(told, number=rank)
    distributed.init_process_group("gloo")
    task, ledger, checkpoint = told.opened_task(), Ledger(told.place / "ledger"), told.place / "checkpoint.pt"
    net = task.model(told.seed)
    optimizer = AdamWScheduleFree(net.parameters(), lr=told.lr)
    step = load_checkpoint(checkpoint, net, optimizer) if is_kept else 0
    optimizer.train()
    replicas, rhythm = DistributedDataParallel(net), _Rhythm(ledger, rank)
    replicas.register_comm_hook(rhythm, _sum_when_computed)
    batches = task.batches(told.seed, rank, step)
    # The first pass and the first sum take longer than all others. It changes nothing.
    task.loss(replicas, next(task.batches(told.seed, rank, step))).backward()  # type: ignore[no-untyped-call]
    began = told.wait_for_begin()
    rhythm.device, rhythm.counts = told.device(task, began), True
    looked = moments(told.seconds, told.look_s) if rank == 0 else []
    album = Album(told.place, began, looked, since=time.monotonic() - began)
    saved = time.monotonic()
    for pair in batches:
        optimizer.zero_grad()
        rhythm.device.begin()
        task.loss(replicas, pair).backward()  # type: ignore[no-untyped-call]
        album.take(lambda: x_of(net, optimizer))
        optimizer.step()
        step += 1
        ledger.append(APPLIED, rank, step)
        if is_kept and rank == 0 and time.monotonic() - saved >= CHECKPOINT_S:
            save_checkpoint(checkpoint, net, optimizer, step)
            saved = time.monotonic()


class _Rhythm:
    """What a rank's gradients are timed by."""

    device = Device(0.0)
    counts = False

    def __init__(self, ledger: Ledger, rank: int) -> None:
        self._ledger, self._rank = ledger, rank

    def wait(self) -> None:
        """Until the device has computed the gradient."""
        is_in_time = self.device.wait()
        if self.counts:
            self._ledger.append(COMPUTED, self._rank, int(is_in_time))


def _sum_when_computed(
    rhythm: Any,
    bucket: distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DDP's own sum. The models are so small that all gradients are one bucket, which is summed when it is whole."""
    rhythm.wait()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
