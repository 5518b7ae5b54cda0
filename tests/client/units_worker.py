"""A worker whose weights count examples, in a process of its own; test_units_processes.py kills some of them.

python tests/client/units_worker.py URL RUN WORKER LENGTH (JSON of options of Units) WORKERS_OF_THE_LOADER

It says a line after each step, and takes the next one once it has read a line; then it goes on by itself from "go".
"""

from __future__ import annotations

import json
import multiprocessing
import sys

import torch
from torch import nn

import freestep

torch.set_num_threads(1)
# The tests' own processes are daemons, which may have no children as a DataLoader's workers are.
multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
url, run, worker, length, options, workers = sys.argv[1:]
model = nn.ParameterDict({"count": nn.Parameter(torch.zeros(int(length)))})
waits = True
with freestep.RemoteOptimizer(
    model, url=url, run=run, worker=worker, algorithm="sgd", lr=1.0, aggregation="async", lease_ttl_ms=2000
) as optimizer:
    units = freestep.Units(optimizer, int(length), **json.loads(options))
    for examples in units.loader(range(int(length)), batch_size=units.spec.unit, num_workers=int(workers)):
        if waits:
            sys.stdout.write("taken\n")
            sys.stdout.flush()
            waits = sys.stdin.readline() != "go\n"
        optimizer.zero_grad()
        (-model["count"][examples].sum()).backward()
        optimizer.step()
sys.stdout.write("done\n")
sys.stdout.flush()
