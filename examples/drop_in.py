"""A script for the `schedulefree` package with its import line changed.

    FREESTEP_URL=local python examples/drop_in.py                    # at home: the run is in the process
    FREESTEP_URL=http://127.0.0.1:8000 python examples/drop_in.py    # on `freestep serve`, as often as you like

needs the `demo` extra, for its 5,000 digits.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import cross_entropy

# from schedulefree import AdamWScheduleFree
from freestep import AdamWScheduleFree
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, default=0.0025)
parser.add_argument("--run", default="drop-in")
args = parser.parse_args()

torch.set_num_threads(1)
digits = load()
model = SmallConvNet()
# The run is all that is new. Parameters with names make a run whose weights fit the model's state_dict.
optimizer = AdamWScheduleFree(model.named_parameters(), lr=args.lr, warmup_steps=50, run=args.run)
for epoch in range(args.epochs):
    model.train()
    optimizer.train()
    for indices in torch.split(torch.randperm(len(digits.train_labels)), 32):
        optimizer.zero_grad()
        cross_entropy(model(digits.train_images[indices]), digits.train_labels[indices]).backward()
        optimizer.step()
    model.eval()
    optimizer.eval()
    with torch.no_grad():
        accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    group = optimizer.param_groups[0]
    print(f"epoch {epoch}: {accuracy:.1%} test accuracy at step {group['k']}, weights sum to {group['weight_sum']:.3g}")
optimizer.close()
