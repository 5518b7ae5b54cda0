"""A script in the shape of Accelerate's own example of Schedule-Free; a test runs it with one import changed.

It trains a small classifier with the `schedulefree` package, and evaluates after each epoch.
"""

from __future__ import annotations

import schedulefree
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

GRADIENT_ACCUMULATION_STEPS = 2

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(96, 5, generator=generator)
dataset = TensorDataset(inputs, (inputs.sum(1) > 0).long())

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05, betas=(0.9, 0.95))
model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
    model, optimizer, DataLoader(dataset, batch_size=8), DataLoader(dataset, batch_size=32)
)
losses = []
for _ in range(3):
    model.train()
    optimizer.train()
    for step, (batch, labels) in enumerate(train_dataloader):
        loss = torch.nn.functional.cross_entropy(model(batch), labels) / GRADIENT_ACCUMULATION_STEPS
        accelerator.backward(loss)
        if (step + 1) % GRADIENT_ACCUMULATION_STEPS == 0:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    optimizer.eval()
    total = 0.0
    for batch, labels in eval_dataloader:
        with torch.no_grad():
            outputs = model(batch)
        outputs, labels = accelerator.gather_for_metrics((outputs, labels))
        total += torch.nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
    losses.append(total / len(dataset))
