"""A worker in Lightning Fabric: start `freestep serve`, and then this as often as you like.

    python examples/train_fabric.py

needs the `demo` extra, for its 5,000 digits, and lightning.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import freestep
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet

torch.set_num_threads(1)
fabric = Fabric()
fabric.launch()
digits = load()
net = SmallConvNet().to(fabric.device)
# process_group="auto": with several devices, their processes are one worker.
with freestep.RemoteOptimizer(net, run="fabric", lr=2.5e-3, process_group="auto") as remote:
    model, opt = fabric.setup(net, remote)
    training = TensorDataset(digits.train_images, digits.train_labels)
    loader = fabric.setup_dataloaders(DataLoader(training, batch_size=32, shuffle=True))
    for epoch in range(3):
        model.train()
        for inputs, targets in loader:
            opt.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            fabric.backward(loss)
            fabric.clip_gradients(model, opt, max_norm=1.0)
            opt.loss = loss.detach()  # Fabric's step takes no argument for it
            opt.step()
        opt.eval()  # x
        model.eval()
        with torch.no_grad():
            predicted = model(digits.test_images.to(fabric.device)).argmax(1).cpu()
        fabric.print(f"epoch {epoch}: x has {(predicted == digits.test_labels).float().mean():.1%} test accuracy")
        with tempfile.TemporaryDirectory() as folder:
            fabric.save(Path(folder, "x.ckpt"), {"model": model, "optimizer": opt})  # the model at x
        opt.train()  # y
