"""A worker that may straggle: `straggler.py URL RUN NAME PUSHES`.

It pushes gradients of 1, prints a line for each push, and then holds its lease until its input ends.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from freestep import Client, RemoteOptimizer


def main(url: str, run: str, name: str, pushes: str) -> None:
    torch.set_num_threads(1)
    with Client(url) as client:
        slots = client.run(run).manifest.slots
    parameters = [(slot.name, nn.Parameter(torch.zeros(slot.shape))) for slot in slots]
    optimizer = RemoteOptimizer(parameters, url=url, run=run, worker=name, algorithm="sgd", lr=1.0)
    for _ in range(int(pushes)):
        for _, parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        sys.stdout.write(f"{optimizer.receipt.step}\n")
        sys.stdout.flush()
    sys.stdin.read()
    optimizer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
