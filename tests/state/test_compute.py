"""Device locks, and the number of threads that compute."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from forked import Script
from freestep_service.state.compute import HOST, DeviceLocks
from meanwhile import DEADLINE_S

THREADS = """
import os, torch
from freestep_service.state.compute import arithmetic_threads

def compute():
    torch.rand(250).sqrt_()
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
with arithmetic_threads("test", 1) as pool:
    pool.submit(int).result()
    before = len(os.listdir("/proc/self/task"))
    print(pool.submit(compute).result() - before, flush=True)
"""


def test_a_thread_that_computes_has_no_helpers() -> None:
    # Once the pool has a thread, nothing that it computes may start more.
    with Script(THREADS) as script:
        assert script.read_line() == "0"
        assert script.wait() == 0


def test_one_computes_at_a_time_on_a_device() -> None:
    locks, at_work, most = DeviceLocks(), 0, 0
    both = threading.Barrier(2, timeout=DEADLINE_S)

    def work() -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        torch.rand(10_000).sum()
        at_work -= 1

    def ask() -> None:
        both.wait()
        for _ in range(200):
            locks.exclusive(HOST, work)()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(ask) for _ in range(2)]:
            each.result()
    assert most == 1


def test_devices_do_not_wait_for_each_other() -> None:
    locks, met = DeviceLocks(), threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(locks.exclusive(device, met.wait), 30) for device in (HOST, torch.device("meta"))]
        assert {each.result() for each in waits} == {0, 1}
