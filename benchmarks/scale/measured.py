"""Throughput and CPU of real services on this machine, under the load of one generator.

For each number of shards there are as many service processes, with one Redis. A window of pushes is one point: pushes
a second, the CPU that each of them cost generator, services (the event loop's thread apart from the others) and Redis,
and Redis's own account of its commands. Windows of all points alternate over rounds, so that a slow moment of the
machine is not one point's alone; a figure is the median over the rounds in which other programs took least.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
from redis import Redis

from benchmarks.figures import spread
from benchmarks.placing import place
from benchmarks.scale.generator import Generator
from benchmarks.services import Service, cpu_seconds, running_service
from freestep import Client
from freestep_service.coordination.embedded import embedded_store

__all__ = ["SHARDS", "SIZES", "WORKERS", "Point", "machine", "measure"]

SHARDS = (1, 2, 4)
SIZES = (100_000, 300_000, 1_000_000)
WORKERS = (1, 4, 16, 64, 256)
ROUNDS, SECONDS, WARMUP_S = 3, 0.5, 0.2
QUICK_SIZES, QUICK_WORKERS, QUICK_ROUNDS, QUICK_SECONDS = (100_000, 1_000_000), (1, 16), 1, 0.5

_UNDISTURBED = 0.1
"""Cores that other programs may have taken more than in the best round."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Point:
    """One number of shards, parameters and workers; all CPU is in seconds a push."""

    shards: int
    parameters: int
    workers: int
    pushes_per_s: float
    spread: float
    """Half the distance between the quartiles of the rounds, in pushes a second."""
    push_s: float
    """The median of a push, as its worker waits for it."""
    staleness: float
    """The mean."""
    without_y: float
    """The share of pushes that were answered with a receipt alone."""
    generator_cpu: float
    loop_cpu: float
    """Of the services' threads that run event loops, summed over the services."""
    update_cpu: float
    """Of their other threads."""
    redis_cpu: float
    busy_cores: float
    """How many cores these used together."""
    other_cores: float
    """How many other programs used meanwhile."""
    redis_calls: float
    """Scripts that Redis ran, a push."""
    redis_call_us: float
    """What Redis says that one took."""


def measure(quick: bool) -> list[Point]:
    """All points, shards by shards."""
    return [point for shards in SHARDS for point in _measure(shards, quick)]


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": models[0] if models else platform.machine(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _lines(file: str) -> Iterable[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else ()


def _measure(shards: int, quick: bool) -> list[Point]:
    sizes, numbers = (QUICK_SIZES, QUICK_WORKERS) if quick else (SIZES, WORKERS)
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="freestep-bench-"))
        redis_url = stack.enter_context(embedded_store(Path(folder)))
        store = stack.enter_context(Redis.from_url(redis_url, decode_responses=True))
        shared = {"redis_url": redis_url, "checkpoint_url": f"{folder}/checkpoints"}
        services = [stack.enter_context(running_service(**shared)) for _ in range(shards)]
        client = stack.enter_context(Client(services[0].url))
        windows: dict[tuple[int, int], list[dict[str, float]]] = {}
        for parameters in sizes:
            run = client.run(f"scale-{parameters}")
            place(run, services, parameters, shards)
            with Generator(run, services[0].url, shards) as generator:
                generator.join(max(numbers))
                for number in range(rounds):
                    for workers in numbers if number % 2 == 0 else reversed(numbers):
                        taken = _window(generator, services, store, workers, seconds)
                        windows.setdefault((parameters, workers), []).append(taken)
            run.delete()
    return [Point(shards, *key, **_medians(taken)) for key, taken in windows.items()]


def _medians(windows: Sequence[dict[str, float]]) -> dict[str, float]:
    least = min(each["other_cores"] for each in windows) + _UNDISTURBED
    used = [each for each in windows if each["other_cores"] <= least]
    found = {name: median(each[name] for each in used) for name in used[0]}
    return {**found, "spread": spread([each["pushes_per_s"] for each in used])}


def _window(
    generator: Generator, services: Sequence[Service], store: Redis, workers: int, seconds: float
) -> dict[str, float]:
    redis_pid = store.info("server")["process_id"]
    borders: list[_Used] = []

    def at_border() -> None:
        borders.append(_used([service.pid for service in services], redis_pid, store))

    taken, length = generator.push(workers, WARMUP_S, seconds, at_border)
    before, after = borders
    pushes = len(taken.seconds)
    each = {name: (value - asdict(before)[name]) / pushes for name, value in asdict(after).items()}
    parts = ("generator_cpu", "loop_cpu", "update_cpu", "redis_cpu")
    return {
        "pushes_per_s": pushes / length,
        "push_s": median(taken.seconds),
        "staleness": mean(taken.staleness) if taken.staleness else 0.0,
        "without_y": taken.without_y / pushes,
        **{name: each[name] for name in parts},
        "busy_cores": (own := sum(each[name] for name in parts) * pushes / length),
        "other_cores": max(0.0, each["all_cpu"] * pushes / length - own),
        "redis_calls": each["redis_calls"],
        "redis_call_us": each["redis_us"] / max(each["redis_calls"], 1e-9),
    }


@dataclass(frozen=True)
class _Used:
    """CPU and calls so far."""

    generator_cpu: float
    loop_cpu: float
    update_cpu: float
    redis_cpu: float
    redis_calls: float
    redis_us: float
    all_cpu: float
    """Of everybody on the machine."""


def _used(pids: Sequence[int], redis_pid: int, store: Redis) -> _Used:
    loops = sum(map(_first_thread_seconds, pids))
    called = store.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "usec": 0})
    return _Used(
        time.process_time(),
        loops,
        sum(map(cpu_seconds, pids)) - loops,
        cpu_seconds(redis_pid),
        called["calls"],
        called["usec"],
        _all_cpu(),
    )


def _all_cpu() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _first_thread_seconds(pid: int) -> float:
    """What a process's first thread has used so far, to the kernel's tick."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
