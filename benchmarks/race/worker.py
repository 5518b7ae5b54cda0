"""A worker of freestep: `python -m benchmarks.race.worker TOLD`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from benchmarks.goodput.ledger import APPLIED, COMPUTED, Ledger
from benchmarks.race.methods import EVERY, METHODS
from benchmarks.race.told import Told
from freestep import Client, LocalSteps, RemoteOptimizer

__all__ = ["RUN"]

RUN = "race"
_LEASE_MS = 3000
"""As the demo's: a killed worker is soon known to be gone."""
_PATIENCE_S = 60.0


def main() -> None:
    told = Told.parse(sys.argv[1])
    task, ledger = told.opened_task(), Ledger(told.place / "ledger")
    net = task.model(told.seed)
    # The first pass takes longer than all others. It changes nothing.
    task.loss(net, next(task.batches(told.seed, told.number, 0))).backward()  # type: ignore[no-untyped-call]
    with Client(f"http://{told.meeting}", retry_for=_PATIENCE_S) as client, _optimizer(told, net, client) as optimizer:
        batches = task.batches(told.seed, told.number, optimizer.loaded.step)
        device = told.device(task, told.wait_for_begin())
        receipt = None
        for pair in batches:
            optimizer.zero_grad()
            device.begin()
            loss = task.loss(net, pair)
            loss.backward()  # type: ignore[no-untyped-call]
            ledger.append(COMPUTED, told.number, int(device.wait()))
            optimizer.step(loss=loss.detach(), samples=len(pair[0]))
            if optimizer.receipt is not None and optimizer.receipt is not receipt:
                receipt = optimizer.receipt
                if receipt.decision != "dropped":
                    ledger.append(APPLIED, told.number, receipt.step)


def _optimizer(told: Told, net: nn.Module, client: Client) -> RemoteOptimizer:
    method = METHODS[told.method]
    options: dict[str, Any] = {
        **dict(method.options),
        "client": client,
        "run": RUN,
        "worker": f"worker-{told.number}",
        "lease_ttl_ms": _LEASE_MS,
    }
    if not method.inner:
        return RemoteOptimizer(net, algorithm="adamw_schedule_free", lr=told.lr, **options)
    return LocalSteps(net, torch.optim.AdamW(net.parameters(), lr=told.lr), every=EVERY, dynamic=True, **options)


if __name__ == "__main__":
    main()
