"""A loop with Accelerate as a worker: start `freestep serve`, and then this as often as you like.

    accelerate launch examples/accelerate_loop.py

needs the `integrations` extra, and `demo` for its digits. Started with several processes, these are one worker.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

torch.set_num_threads(1)
accelerator = Accelerator(gradient_accumulation_steps=2)
digits = load()
model = SmallConvNet()
remote = freestep.RemoteOptimizer(model, run="accelerate", lr=2.5e-3, process_group="auto")
model, optimizer, train_loader, test_loader = accelerator.prepare(
    model,
    remote,
    DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=16, shuffle=True),
    DataLoader(TensorDataset(digits.test_images, digits.test_labels), batch_size=100),
)
for epoch in range(3):
    model.train()
    optimizer.train()  # y
    for images, labels in train_loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            remote.loss = loss.detach()  # Accelerate's optimizer.step() takes no loss
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    optimizer.eval()  # x
    hits = []
    for images, labels in test_loader:
        with torch.no_grad():
            predicted = model(images).argmax(1)
        hits.append(accelerator.gather_for_metrics(predicted == labels))
    accelerator.print(f"epoch {epoch}: x has {torch.cat(hits).float().mean():.1%} test accuracy")
remote.close()
accelerator.end_training()
