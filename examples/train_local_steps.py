"""A worker that pushes once in 25 steps: start `freestep serve`, and then this as often as you like.

    python examples/train_local_steps.py

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
inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
with freestep.LocalSteps(model, inner, every=25, run="local", push_dtype="BF16", dynamic=True) as opt:
    for epoch in range(3):
        for indices in torch.split(torch.randperm(len(digits.train_labels)), 32):
            opt.zero_grad()
            loss = cross_entropy(model(digits.train_images[indices]), digits.train_labels[indices])
            loss.backward()
            opt.step(loss=loss.detach(), samples=len(indices))  # a step of AdamW; every 25th pushes
        opt.eval()  # x, which for DiLoCo is y
        with torch.no_grad():
            accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
        print(f"epoch {epoch}: x has {accuracy:.1%} test accuracy; the last push: {opt.receipt}")
        opt.train()  # goes on in its round
