"""A whole worker: start `freestep serve`, and then this as often as you like.

    python examples/train_mnist.py

needs the `demo` extra, for its 5,000 digits.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

torch.set_num_threads(1)
digits = load()
model = SmallConvNet()
with freestep.RemoteOptimizer(model, run="mnist", algorithm="adamw_schedule_free", lr=2.5e-3) as opt:
    for epoch in range(5):
        for indices in torch.split(torch.randperm(len(digits.train_labels)), 32):
            opt.zero_grad()
            loss = cross_entropy(model(digits.train_images[indices]), digits.train_labels[indices])
            loss.backward()
            opt.step(loss=loss.detach(), samples=len(indices))
        opt.eval()  # x
        with torch.no_grad():
            accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
        print(f"epoch {epoch}: x has {accuracy:.1%} test accuracy; the last push: {opt.receipt}")
        opt.train()  # y
