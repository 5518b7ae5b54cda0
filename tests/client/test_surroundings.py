"""A client among other things: workers of a DataLoader, an asyncio loop, and threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from freestep import Client, RemoteOptimizer, Run
from harness import ThreadService
from trained import held, network, pulled, step


@pytest.mark.slow
def test_workers_of_a_data_loader_inherit_it(service: ThreadService, run: Run) -> None:
    # From nothing: a daemonic process, as other scripts are, must not have children of its own.
    command = [sys.executable, str(Path(__file__).with_name("loading.py")), service.url, run.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Its lease was not released by them.
    assert done.stdout == "6 ['parent'] 1\n"
    assert run.workers() == []


def test_it_is_called_within_an_asyncio_loop(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    """As in a notebook: the loop stands still during a call, and goes on after it."""
    ticks = [0]

    async def tick() -> None:
        while True:
            ticks[0] += 1
            await asyncio.sleep(0)

    async def train() -> torch.Tensor:
        ticking = asyncio.create_task(tick())
        model = network()
        optimizer = remotely(model)
        for number in range(3):
            step(model, optimizer, number, overlap=number == 1)
            await asyncio.sleep(0)
        optimizer.flush()
        # And beside the loop, in a thread of its own.
        found = await asyncio.gather(*(asyncio.to_thread(pulled, run) for _ in range(4)))
        assert all(torch.equal(each, held(model)) for each in found)
        ticking.cancel()
        optimizer.eval()
        return held(model)

    x = asyncio.run(train())
    assert torch.equal(x, pulled(run, "x"))
    assert run.status().step == 3
    assert ticks[0] > 3


def test_threads_use_the_client_of_an_optimizer_that_trains(service: ThreadService, name: str) -> None:
    over, seen = threading.Event(), set[int]()
    failures: list[BaseException] = []
    with Client(service.url, retry_for=0) as client:
        model, twin = network(), network()
        optimizer = RemoteOptimizer(model, client=client, run=name, algorithm="sgd", lr=0.1, aggregation="async")
        local = torch.optim.SGD(twin.parameters(), lr=0.1)

        def watch() -> None:
            run, last = client.run(name), 0
            try:
                while not over.is_set():
                    _, at = run.pull("y")
                    assert last <= at <= run.status().step
                    last = at
                    seen.add(at)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=watch) for _ in range(3)]
        for each in threads:
            each.start()
        for number in range(20):
            step(model, optimizer, number)
            step(twin, local, number)
        over.set()
        for each in threads:
            each.join()
        optimizer.close()
    assert failures == []
    assert seen
    torch.testing.assert_close(held(model), held(twin))
