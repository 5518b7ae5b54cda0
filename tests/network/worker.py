"""A worker of many trainings: it reads what to train on, trains until that is to stop, and reads on.

A line of its input is URL RUN NAME FOLDER KIND. KIND `counts` pushes gradients of -1 to a run that takes them off as
they are, so that each parameter counts the pushes applied; `learns` fits a network to one that the workers share. It
writes a line to FOLDER/NAME for every push, stops when there is a file FOLDER/stop, and prints a line then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freestep import Client, RemoteOptimizer

COUNTERS = 3000


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 4))


def counting() -> tuple[nn.Module, dict[str, Any], Iterator[float | None]]:
    model = nn.ParameterDict({"count": nn.Parameter(torch.zeros(COUNTERS))})

    def gradients() -> Iterator[None]:
        while True:
            model["count"].grad = -torch.ones(COUNTERS)
            yield None

    return model, {"algorithm": "sgd", "lr": 1.0}, gradients()


def learning() -> tuple[nn.Module, dict[str, Any], Iterator[float | None]]:
    torch.manual_seed(0)
    target, model = network(), network()

    def gradients() -> Iterator[float]:
        torch.seed()
        while True:
            batch = torch.randn(64, 8)
            model.zero_grad()
            loss = (model(batch) - target(batch).detach()).square().mean()
            loss.backward()
            yield loss.item()

    return model, {"algorithm": "adamw_schedule_free", "lr": 0.03}, gradients()


def train(url: str, run: str, name: str, folder: str, kind: str) -> None:
    model, options, gradients = {"counts": counting, "learns": learning}[kind]()
    place = Path(folder)
    # A cut-off service is given up in seconds, and asked again for as long as the test may take.
    with (
        Client(url, timeout=5, retry_for=120) as client,
        RemoteOptimizer(
            model, client=client, run=run, worker=name, aggregation="async", shards=3, lease_ttl_ms=3000, **options
        ) as optimizer,
        open(place / name, "w") as lines,
    ):
        while not (place / "stop").exists():
            loss = next(gradients)
            # A push counts in the epoch that its gradient was taken in, or not at all.
            epoch = optimizer.loaded.epoch
            optimizer.step(loss=loss)
            assert optimizer.receipt is not None
            lines.write(json.dumps({"epoch": epoch, "loss": loss, **optimizer.receipt.model_dump()}) + "\n")
            lines.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        train(*line.split())
        sys.stdout.write("stopped\n")
        sys.stdout.flush()
