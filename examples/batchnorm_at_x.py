"""BatchNorm at x: estimate its statistics anew before the averaged weights are used.

A worker's BatchNorm gathers its running mean and variance while the model holds y, and they never leave the worker.
x is another point, so the statistics there are others.

    python examples/batchnorm_at_x.py

needs a running service, and the `demo` extra for its digits.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import freestep
from freestep.demo.data import Digits, load


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 6 * 6, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    return float((model(digits.test_images).argmax(1) == digits.test_labels).float().mean())


torch.set_num_threads(1)
torch.manual_seed(0)
digits = load()
model = build()
with freestep.RemoteOptimizer(model, run="batchnorm", algorithm="sgd_schedule_free", lr=0.5) as opt:
    for indices in torch.split(torch.randperm(len(digits.train_labels)), 32):
        opt.zero_grad()
        cross_entropy(model(digits.train_images[indices]), digits.train_labels[indices]).backward()
        opt.step()
    opt.eval()

print(f"x with statistics of y: {accuracy(model, digits):.1%} test accuracy")
freestep.reestimate_batchnorm(model, torch.split(digits.train_images[:2000], 200))
print(f"x with its own:         {accuracy(model, digits):.1%}")
