"""One rank of a worker of two; test_worker_group.py runs both, and reads what each of them saw.

torchrun --nproc-per-node 2 tests/client/rank.py URL RUN FILE
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from freestep import Client, RemoteOptimizer
from trained import saved_residual

url, name, file = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
model = nn.Linear(4, 3)
seen: dict[str, dict[str, Any]] = {}


def see(event: str, what: Callable[[], Any]) -> None:
    """Does something on all ranks, and records what this rank observes."""
    error = None
    try:
        what()
    except (Exception, KeyboardInterrupt, SystemExit) as caught:
        error = f"{type(caught).__name__}: {caught}"
    seen[event] = {
        "error": error,
        "receipt": opt.receipt and opt.receipt.model_dump(),
        "pulled": [opt.loaded.epoch, opt.loaded.step] if opt.loaded.point == "y" else None,
        "parameters": nn.utils.parameters_to_vector(model.parameters()).tolist(),
    }


def step(value: float, **options: Any) -> Callable[[], Any]:
    """A step with a gradient of this value everywhere."""

    def work() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        opt.step(**options)

    return work


def bad() -> float:
    if rank == 1:
        raise ValueError("bad")
    return 0.0


def ended() -> float:
    return sys.exit("enough") if rank == 1 else 0.0


def interrupted_on(number: int) -> Callable[[], float]:
    def work() -> float:
        if rank == number:
            raise KeyboardInterrupt
        return 0.0

    return work


def by_the_first(work: Callable[[], Any]) -> None:
    if rank == 0:
        work()
    dist.barrier()


options: dict[str, Any] = {"url": url, "run": name, "algorithm": "sgd", "lr": 1.0, "process_group": True}
opt = RemoteOptimizer(model, worker="group", shards=3, aggregation="async", **options)
with Client(url) as client:
    run = client.run(name)
    see("joined", lambda: None)
    see("weighted", step(rank + 1.0, samples=1 + 2 * rank, loss=rank))
    seen["weighted"]["loss"] = run.status().loss
    see("unweighted", step(rank + 1.0))
    see("nan", step(float("nan") if rank == 1 else 0.0))
    see("raised", lambda: opt.step(bad))
    for number in range(2):
        see(f"interrupted on {number}", partial(opt.step, interrupted_on(number)))
    see("interrupted for all", lambda: opt._worker_group.run_on_first(interrupted_on(0)))
    see("ended on 1", lambda: opt.step(ended))
    by_the_first(lambda: run.lease("group").release())
    see("fenced", step(1.0))
    by_the_first(lambda: run.restore(0))
    see("restored", step(1.0))
    see("eval", opt.eval)
    see("at x", step(1.0))
    see("train", opt.train)
    by_the_first(lambda: run.reshard(2))
    see("resharded", step(1.0))
    see("resharded, next", step(1.0))
    see("other", lambda: RemoteOptimizer(nn.Linear(4, 3 + rank), **options))
    seen["other"]["workers"] = [worker.worker for worker in run.workers()]
    dist.barrier()
    opt.close()
    dist.barrier()
    seen["other"]["workers at last"] = [worker.worker for worker in run.workers()]
encoded = {**options, "run": f"{name}-encoded", "shards": 3, "push_encoding": "int8", "process_group": "auto"}
with RemoteOptimizer(model, **encoded) as opt:
    begun, pushed = nn.utils.parameters_to_vector(model.parameters()).detach(), torch.zeros(15)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(15, generator=generator)
        pushed += 1.5 * gradient
        for parameter, part in zip(model.parameters(), gradient.split((12, 3)), strict=True):
            parameter.grad = (rank + 1) * part.view_as(parameter)
        opt.step()
    moved = begun - nn.utils.parameters_to_vector(model.parameters()).detach()
    residual = saved_residual(opt)
    seen["encoded"] = {"residual": residual.tolist(), "lacking": (pushed - moved).tolist()}
    dist.barrier()
with (
    RemoteOptimizer(model, worker="group", **{**options, "run": f"{name}-late", "shards": 3}) as opt,
    Client(url) as client,
):
    run = client.run(f"{name}-late")
    see("late, joined", lambda: None)
    for number in range(3):
        see(f"late {number}", step(rank + 1.0, overlap=True))
    # Of one rank alone, while a push is in flight: no collective.
    by_the_first(opt.state_dict)
    see("late, flushed", opt.flush)
    by_the_first(lambda: run.lease("group").release())
    see("late, fenced", step(1.0, overlap=True))
    see("late, after it", step(1.0, overlap=True))
    see("late, nan", step(float("nan") if rank == 1 else 0.0, overlap=True))
    see("late, refused", step(1.0, overlap=True))
    see("late, again", lambda: opt.step(overlap=True))
    see("late, landed", opt.flush)
    by_the_first(lambda: run.restore(0))
    see("late, lost", step(1.0, overlap=True))
    see("late, restored", step(1.0, overlap=True))
    see("late, eval", opt.eval)
    see("late, train", opt.train)
    scaler = ShardedGradScaler("cpu", 1.0, process_group=dist.group.WORLD)
    for event, value in (("overflow", float("inf") if rank == 1 else 0.0), ("no overflow", 1.0)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.zeros(1))
        see(event, lambda: (scaler.step(opt, overlap=True), scaler.update()))
    see("late, at last", opt.flush)
    dist.barrier()
with (
    RemoteOptimizer(model, **{**options, "run": f"{name}-encoded", "pull_dtype": "I8"}) as opt,
    Client(url) as client,
):
    y, _ = client.run(f"{name}-encoded").pull("y", dtype="I8")
    seen["int8"] = {
        "parameters": nn.utils.parameters_to_vector(model.parameters()).tolist(),
        "y": torch.cat([tensor.reshape(-1) for tensor in y.values()]).tolist(),
    }
    dist.barrier()
said: list[str] = []
logged = logging.Handler()
logged.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("freestep").addHandler(logged)
for process_group in (None, False):
    alone = {**options, "run": f"{name}-{process_group}-{rank}", "process_group": process_group}
    with RemoteOptimizer(model, **alone) as opt:
        said.clear()
        for _ in range(2):
            see("alone", step(1.0))
        seen[f"process_group={process_group}"] = {"error": None, "said": [text for text in said if "ranks" in text]}
with open(f"{file}.{rank}", "w") as opened:
    json.dump(seen, opened)
dist.destroy_process_group()
