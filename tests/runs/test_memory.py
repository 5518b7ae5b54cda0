"""The service's memory does not grow with the number of its workers, but for what they share with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest

from freestep import Client, Flat, HeldLease
from harness import AUTHORIZED, ProcessService
from meanwhile import under_way

PARAMETERS = 25_000_000
WORKERS = 8
ROUNDS = 3
GIB = 1024**3


def peak_rss(pid: int) -> int:
    """The peak of a process's resident memory, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def shared_bytes(service: ProcessService) -> int:
    """What the service says that it shares with workers, in bytes."""
    text = httpx.get(f"{service.url}/metrics", headers=AUTHORIZED).text
    return int(next(float(line.split()[1]) for line in text.splitlines() if line.startswith("freestep_shared_memory")))


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "shares"), [("async", False), ("async", True), ("sync", True)])
def test_eight_workers_on_25m_parameters_stay_under_the_bound(
    start_process: Callable[..., ProcessService], policy: str, shares: bool
) -> None:
    service = start_process()
    assert service.process is not None
    with Client(service.url, retry_for=120, shared_memory=shares) as client:
        run = client.run("large")
        run.create(
            {
                "optimizer": {"algorithm": "adamw_schedule_free"},
                "aggregation": {"policy": policy},
                "parameters": [{"name": "w", "shape": [PARAMETERS // 1000, 1000]}],
            }
        )
        gradient = Flat(run.manifest)
        run.initialize(gradient)
        gradient.vector.fill_(1e-3)
        leases = [run.lease(f"worker-{number}") for number in range(WORKERS)]

        def work(lease: HeldLease) -> None:
            arriving = Flat(run.manifest)
            for _ in range(ROUNDS):
                step = run.status().step
                run.exchange(gradient, lease.claim(step), arriving, wait=60)

        workers = [under_way(partial(work, lease)) for lease in leases]
        run.checkpoint()
        run.pull_into(Flat(run.manifest), "x")
        for worker in workers:
            worker.result()
        shared = shared_bytes(service)
        assert (shared >= 2 * 4 * PARAMETERS) == shares
        for lease in leases:
            lease.release()
    assert peak_rss(service.process.pid) - shared < 1.6 * GIB
