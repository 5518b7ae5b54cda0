"""A worker of a character model: region_worker.py URL RUN WORKER OF GROUP BATCHES WIDTH LAYERS PACE_MS

It is number WORKER of OF workers in all, whose updates are of GROUP pushes each. A batch that is dropped, since the run
was moved meanwhile, is taken again: each counts once. It prints a line when the run has weights, trains when it is
given one, and prints how many batches were dropped. A batch takes PACE_MS longer than this small model does, as one of
a model takes that is worth regions.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from examples.lab.characters import Text, Transformer
from freestep import RemoteOptimizer

BATCH, LENGTH = 8, 64


def model_of(text: Text, width: int, layers: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(text.alphabet, LENGTH, width, layers)


def main() -> None:
    torch.set_num_threads(1)
    url, run, *numbers = sys.argv[1:]
    worker, of, group, batches, width, layers, pace_ms = map(int, numbers)
    text = Text(LENGTH)
    model, dropped = model_of(text, width, layers), 0
    with RemoteOptimizer(
        model,
        url=url,
        run=run,
        worker=f"worker-{worker}",
        algorithm="adamw_schedule_free",
        # As many distinct workers to an update, also while some of them join again.
        aggregation={"policy": "quorum", "batch": group},
        warmup_steps=batches // 10,
    ) as optimizer:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        for number in range(batches):
            while True:
                optimizer.zero_grad()
                loss = model.loss(text.batch(BATCH, number * of + worker))
                loss.backward()  # type: ignore[no-untyped-call]
                time.sleep(pace_ms / 1000)
                optimizer.step(loss=loss.detach(), samples=BATCH)
                assert optimizer.receipt is not None
                if optimizer.receipt.decision != "dropped":
                    break
                dropped += 1
    sys.stdout.write(json.dumps({"worker": worker, "dropped": dropped}) + "\n")


if __name__ == "__main__":
    main()
