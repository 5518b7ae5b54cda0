"""A worker of the experiment `delay`, a process of its own: it joins one run after another, and pauses in between
its gradients. Of each run it prints how stale its gradients were, as JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from itertools import count
from typing import Any

import torch

from examples.lab.delay import BATCH, problem
from examples.lab.training import batches
from freestep.client import Client
from freestep.errors import RunNotFound
from freestep.flat import Flat
from freestep.run import Run

_PAUSE_S = 0.02


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    made = problem(told["form"])
    with Client(told["url"]) as client:
        for number in count():
            run = client.run(f"uneven-{number}")
            _await(run)
            order = batches(made.samples, BATCH, 1000 * number + told["worker"])
            gradient, y, staleness, step = Flat(run.manifest), Flat(run.manifest), [], 0
            with run.lease(f"worker-{told['worker']}", ttl_ms=3_600_000) as lease:
                while len(run.workers()) < told["workers"]:
                    time.sleep(_PAUSE_S)
                at = run.pull_into(y, "y").step
                while step < told["steps"]:
                    gradient.views["w"].copy_(made.gradient(y.views["w"], next(order)))
                    time.sleep(told["pause_ms"] / 1000)
                    receipt, pulled = run.exchange(gradient, lease.claim(at), y)
                    at, step = pulled.step, receipt.step
                    staleness.append(receipt.staleness)
            print(json.dumps({"staleness": staleness}), flush=True)


def _await(run: Run) -> None:
    """Returns once the run has its weights."""
    while True:
        with suppress(RunNotFound):
            if run.status().initialized:
                return
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
