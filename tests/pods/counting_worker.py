"""A worker's script whose weights count: each example moves a weight of its own by 1 whenever a push of it counts.

Service, token and the run's name are in its environment. COUNTING is JSON of what runs it trains in turns: options of
freestep.RemoteOptimizer, by the ends of the runs' names, and `length`, the number of their examples. It prints a line
for what it was told of each push: the run's end, epoch, decision, step and example.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from itertools import zip_longest

import torch

import freestep

torch.set_num_threads(1)
asked = json.loads(os.environ["COUNTING"])
length = asked["length"]
models, optimizers, units = {}, {}, {}
with ExitStack() as stack:
    for end, options in asked["runs"].items():
        models[end] = torch.nn.ParameterDict({"count": torch.nn.Parameter(torch.zeros(length))})
        made = freestep.RemoteOptimizer(
            models[end], run=f"{os.environ['FREESTEP_RUN']}-{end}", algorithm="sgd", lr=1.0, **options
        )
        optimizers[end] = stack.enter_context(made)
        units[end] = freestep.Units(made, length, unit=1)
    # Of one run's units a worker may get more than of another's.
    for taken in zip_longest(*units.values()):
        for (end, optimizer), examples in zip(optimizers.items(), taken, strict=True):
            if examples is None:
                continue
            optimizer.zero_grad()
            (-models[end]["count"][list(examples)].sum()).backward()
            epoch = optimizer.loaded.epoch
            optimizer.step()
            receipt = optimizer.receipt
            assert receipt is not None
            sys.stdout.write(f"{end} {epoch} {receipt.decision} {receipt.step} {examples.start}\n")
            sys.stdout.flush()
