"""A worker of rounds, in a process of its own; test_local_processes.py runs some of them.

python tests/client/local_worker.py WORKER (JSON of LocalSteps' options)

It counts: a step makes each parameter larger by 1. For each line of its input it takes so many steps, and says what has
become of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

import freestep

torch.set_num_threads(1)
options = json.loads(sys.argv[2])


class Ticks:
    """A clock on which each step takes as long as the worker says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


clock, seconds = Ticks(), options.pop("seconds", 1.0)
model = nn.ParameterDict({"count": nn.Parameter(torch.zeros(1000))})
inner = torch.optim.SGD(model.parameters(), lr=1.0)
with freestep.LocalSteps(model, inner, worker=sys.argv[1], clock=clock, **options) as optimizer:
    say({"joined": optimizer.worker})
    for line in sys.stdin:
        for _ in range(int(line)):
            model["count"].grad = torch.full((1000,), -1.0)
            clock.now += seconds
            optimizer.step()
        receipt = optimizer.receipt
        say(
            {
                "steps": optimizer.steps,
                "length": optimizer.length,
                "counted": sorted(set(model["count"].tolist())),
                "decision": receipt and receipt.decision,
                "step": receipt and receipt.step,
            }
        )
