"""One rank of two, with a model that torch has wrapped; test_wrapped_ranks.py runs both, and reads what each saw.

torchrun --nproc-per-node 2 tests/client/wrapped_rank.py URL RUN FILE
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from freestep import RemoteOptimizer
from trained import held, loss_of, network

url, name, file = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
seen: dict[str, Any] = {}
messages: list[str] = []


class Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())


logging.getLogger("freestep").addHandler(Messages())


def train(model: nn.Module, optimizer: RemoteOptimizer) -> None:
    """Three steps; each rank has every other batch, and the last step's gradient is that of two batches."""
    for number in range(0, 4, 2):
        optimizer.zero_grad()
        loss_of(model, number + rank).backward()
        optimizer.step(samples=8)
    optimizer.zero_grad()
    with model.no_sync():
        (loss_of(model, 4 + rank) / 2).backward()
    (loss_of(model, 6 + rank) / 2).backward()
    optimizer.step(samples=8)


def refused(model: Callable[[], nn.Module], run: str) -> str:
    try:
        RemoteOptimizer(model(), url=url, run=run, process_group=True).close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


options: dict[str, Any] = {"url": url, "aggregation": "async", "process_group": True, "lr": 0.05}
for order in ("before", "after"):
    model = network(rank)
    if order == "before":
        wrapped = DistributedDataParallel(model)
        optimizer = RemoteOptimizer(wrapped, run=f"{name}-{order}", **options)
    else:
        optimizer = RemoteOptimizer(model, run=f"{name}-{order}", **options)
        wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer)
    states = get_state_dict(wrapped, optimizer)
    set_state_dict(wrapped, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    seen[order] = {"parameters": held(model).tolist(), "worker": optimizer.worker, "messages": list(messages)}
    optimizer.close()

messages.clear()
model = network(rank)
with RemoteOptimizer(model, run=f"{name}-alone", **{**options, "process_group": None}) as optimizer:
    train(DistributedDataParallel(model), optimizer)
seen["alone"] = {"messages": list(messages)}

seen["fully_shard"] = refused(lambda: fully_shard(network(rank)), f"{name}-sharded")
seen["FSDP"] = refused(
    lambda: FullyShardedDataParallel(network(rank), device_id=torch.device("cpu")), f"{name}-sharded"
)
seen["FSDP, original parameters"] = refused(
    lambda: FullyShardedDataParallel(network(rank), device_id=torch.device("cpu"), use_orig_params=True),
    f"{name}-sharded",
)
with open(f"{file}.{rank}", "w") as out:
    json.dump(seen, out)
dist.destroy_process_group()
