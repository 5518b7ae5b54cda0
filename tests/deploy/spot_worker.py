"""A training script as a fleet runs it, of a model of 20 MB; it prints the decision on each of its pushes."""

import sys
import time

import torch

import freestep

torch.set_num_threads(1)
model = torch.nn.Linear(5000, 1000)
with freestep.RemoteOptimizer(
    model, algorithm="sgd_schedule_free", lr=0.01, lease_ttl_ms=3000, aggregation={"policy": "async"}
) as opt:
    while True:
        opt.zero_grad()
        model(torch.ones(1, 5000)).mean().backward()
        opt.step()
        sys.stdout.write(f"{opt.receipt.decision} {opt.receipt.step}\n")
        # As a step on a GPU, which leaves the processor to others.
        time.sleep(0.5)
