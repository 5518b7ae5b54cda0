"""Several processes that are one worker: each has a share of the batch, and a GPU if there is one.

    torchrun --nproc-per-node 2 examples/train_torchrun.py --url http://127.0.0.1:8000

needs a running service. The run is cut into two shards, so each of two ranks pushes one of them.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

import freestep

parser = argparse.ArgumentParser()
parser.add_argument("--url", help="the service's URL; without it, FREESTEP_URL's")
parser.add_argument("--name", default="torchrun", help="the run's name")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=64, help="samples of a step, over all ranks")
parser.add_argument("--save", metavar="FILE", help="where each rank leaves its parameters, with its number appended")
arguments = parser.parse_args()

torch.set_num_threads(1)
# Tensors of the host travel by gloo, whatever the model is on.
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device).requires_grad_(False)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
with freestep.RemoteOptimizer(
    model,
    url=arguments.url,
    run=arguments.name,
    algorithm="adamw_schedule_free",
    lr=0.02,
    shards=2,
    process_group=True,
) as opt:
    generator = torch.Generator().manual_seed(1)
    for step in range(arguments.steps):
        # Every rank draws the whole batch, and takes its share.
        inputs = torch.randn(arguments.batch, 16, generator=generator).tensor_split(ranks)[rank].to(device)
        opt.zero_grad()
        loss = mse_loss(model(inputs), teacher(inputs))
        loss.backward()
        opt.step(loss=loss.detach(), samples=len(inputs))
        if step == 0 and rank == 0:
            print(f"loss at first: {loss:.4f}")
    opt.eval()  # x, on every rank

if arguments.save:
    torch.save(model.state_dict(), f"{arguments.save}.{rank}")
inputs = torch.randn(1000, 16, generator=generator).to(device)
if rank == 0:
    print(f"final loss: {mse_loss(model(inputs), teacher(inputs)):.4f}")
dist.destroy_process_group()
