"""A worker of the experiment `language`, a process of its own; it prints how far it is, as JSON."""

from __future__ import annotations

import json
import sys
import time
from statistics import mean
from typing import Any

import torch

from examples.lab.characters import Text
from examples.lab.language import BATCH, LOOKS, Size, options
from freestep import Client, RemoteOptimizer

_PAUSE_S = 0.02


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    size, policy, correction, worker = Size(**told["size"]), told["policy"], told["correction"], told["worker"]
    text = Text(size.length)
    model = size.model(text)
    staleness = []
    with (
        Client(told["url"]) as client,
        RemoteOptimizer(
            model,
            client=client,
            run=policy,
            algorithm="adamw_schedule_free",
            aggregation=policy,
            worker=f"worker-{worker}",
            durability="none",
            delay_correction={"name": correction},
            **options(size, size.workers if policy == "sync" else 1, told["lr"]),
        ) as optimizer,
    ):
        # Under `sync` those who begin earlier would make steps without the others.
        while len(client.run(policy).workers()) < size.workers:
            time.sleep(_PAUSE_S)
        for number in range(size.batches):
            optimizer.zero_grad()
            loss = model.loss(text.batch(BATCH, number * size.workers + worker))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(loss=loss.detach(), samples=BATCH)
            assert optimizer.receipt is not None
            if optimizer.receipt.decision == "dropped":
                raise RuntimeError(f"a push was dropped: {optimizer.receipt.reason}")
            staleness.append(optimizer.receipt.staleness)
            if (number + 1) % max(1, size.batches // LOOKS) == 0 and number + 1 < size.batches:
                print(json.dumps({"worker": worker, "batches": number + 1}), flush=True)
    print(json.dumps({"worker": worker, "mean_staleness": mean(staleness)}), flush=True)


if __name__ == "__main__":
    main()
