"""One rank of two, of a Trainer and then of Fabric, by DistributedDataParallel; test_lightning_ranks.py runs both.

LOCAL_RANK=0 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=... python tests/client/lightning_rank.py URL RUN FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler

from freestep import RemoteOptimizer
from lightning_module import Module, loader, samples, trainer
from trained import held, network

url, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
rank = int(os.environ["LOCAL_RANK"])
torch.set_num_threads(1)
# Each rank begins with other weights; the run has those of the first.
module = Module(
    lambda model: RemoteOptimizer(model, url=url, run=name, aggregation="async", process_group="auto"),
    seed=rank,
)
savers = (
    ModelCheckpoint(folder, "best-{step}", monitor="val_loss"),
    ModelCheckpoint(folder, "every-{step}", every_n_train_steps=2, save_top_k=-1),
)
# Lightning's own sampler shuffles.
sampler = DistributedSampler(samples(), num_replicas=2, rank=rank, shuffle=False)
options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_epochs": 2}
trainer(folder, *savers, **options).fit(module, loader(sampler=sampler), loader())
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
net = network(rank)
with RemoteOptimizer(net, url=url, run=f"{name}-fabric", aggregation="async", process_group="auto") as remote:
    wrapped, opt = fabric.setup(net, remote)
    for _ in range(2):
        for inputs in loader(sampler=sampler):
            opt.zero_grad()
            fabric.backward(wrapped(inputs).square().mean())
            opt.step()
        opt.eval()
        opt.train()
    opt.eval()
torch.save({"weights": held(module), "stages": module.stages, "fabric": held(net)}, folder / f"rank-{rank}.pt")
