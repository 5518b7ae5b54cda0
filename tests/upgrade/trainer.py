"""What a worker's script does with a service, in a process of its own and in whichever version PYTHONPATH leads to.

python tests/upgrade/trainer.py URL

It writes a line of JSON: what came of each part.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

import freestep

torch.set_num_threads(1)
url = sys.argv[1]
LENGTH, ROUND = 24, 4


def model() -> nn.ParameterDict:
    return nn.ParameterDict({"count": nn.Parameter(torch.zeros(LENGTH))})


said: dict[str, object] = {"version": freestep.__version__}

# Steps, each of which counts; x and y; a saved state.
steps = model()
options = {"algorithm": "sgd", "lr": 1.0, "aggregation": "async"}
with freestep.RemoteOptimizer(steps, url=url, run="steps", push_encoding="int8", **options) as optimizer:
    for _ in range(5):
        optimizer.zero_grad()
        (-steps["count"].sum()).backward()
        optimizer.step(loss=torch.tensor(0.5))
    optimizer.eval()
    optimizer.train()
    said["steps"] = [optimizer.receipt.step, sorted(set(steps["count"].tolist()))]
    saved = optimizer.state_dict()
with freestep.RemoteOptimizer(steps, url=url, run="steps", **options) as optimizer:
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    (-steps["count"].sum()).backward()
    optimizer.step()
    said["resumed"] = optimizer.receipt.step

# Rounds of local steps.
rounds = model()
inner = torch.optim.SGD(rounds.parameters(), lr=1.0)
with freestep.LocalSteps(rounds, inner, url=url, run="rounds", every=ROUND) as optimizer:
    for _ in range(2 * ROUND):
        rounds["count"].grad = torch.full((LENGTH,), -1.0)
        optimizer.step()
    said["rounds"] = optimizer.receipt.step

# Units of data, each of which counts once.
units = model()
with freestep.RemoteOptimizer(units, url=url, run="units", **options) as optimizer:
    for examples in freestep.Units(optimizer, LENGTH, unit=5).loader(range(LENGTH), batch_size=5):
        optimizer.zero_grad()
        (-units["count"][examples].sum()).backward()
        optimizer.step()
    said["units"] = sorted(set(units["count"].tolist()))

with freestep.Client(url) as client:
    run = client.run("steps")
    run.report("accuracy", 0.5, run.status().step)
    x, step = run.pull("x")
    said["pulled"] = [step, sorted(set(x["count"].tolist()))]
    run.set(lr=0.5)
    said["set"] = run.status().control.optimizer
    said["checkpoint"] = run.checkpoint().step
    said["events"] = sorted({event.kind for event in run.events(follow=False)})
    history = run.history()
    said["history"] = [history.step, sorted(history.curves), sorted(history.metrics)]
    state = run.export_state()
    said["state"] = state.step
    client.run("copy").import_state(state)
    said["copy"] = client.run("copy").status().step
    with client.run("copy").lease("worker") as lease:
        said["push"] = client.run("copy").push({"count": torch.ones(LENGTH)}, lease.claim(said["copy"])).step

sys.stdout.write(json.dumps(said, default=str) + "\n")
