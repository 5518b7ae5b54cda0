"""A worker of freestep: `python -m benchmarks.goodput.worker URL NUMBER DURABILITY DATA LEDGER`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.goodput.accounting import pushes_behind
from benchmarks.goodput.ledger import APPLIED, COMPUTED, SEEDED, Ledger, entries
from benchmarks.goodput.training import LR, batches, model
from freestep import Client, Flat, RemoteOptimizer, Run
from freestep.demo.options import end_on_signals

RUN = "goodput"


def main(url: str, name: str, durability: Any, data: str, file: str) -> None:
    end_on_signals()
    number, ledger, net = int(name), Ledger(Path(file)), model()
    held, upload = 0, Run.initialize

    def initialize(run: Run, weights: Mapping[str, Tensor] | Flat) -> None:
        upload(run, weights)
        ledger.append(SEEDED, number, held)

    # Under `none` a worker's weights begin the run anew after a crash, and the pushes in them with them.
    Run.initialize = initialize  # type: ignore[method-assign, assignment]
    with (
        Client(url, retry_for=600.0) as client,
        RemoteOptimizer(
            net, client=client, run=RUN, lr=LR, worker=f"worker-{number}", lease_ttl_ms=3000, durability=durability
        ) as optimizer,
    ):
        epoch, behind = optimizer.loaded.epoch, pushes_behind(entries(Path(file)))
        for images, labels in batches(Path(data)):
            optimizer.zero_grad()
            loss = cross_entropy(net(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            computed = ledger.append(COMPUTED, number, optimizer.loaded.step)
            optimizer.step(loss=loss.detach(), samples=len(images))
            receipt = optimizer.receipt
            if receipt is not None and receipt.decision == "applied":
                ledger.append(APPLIED, number, receipt.step, computed)
            if optimizer.loaded.epoch != epoch:
                epoch, behind = optimizer.loaded.epoch, pushes_behind(entries(Path(file)))
            held = behind + optimizer.loaded.step


if __name__ == "__main__":
    main(*sys.argv[1:])
