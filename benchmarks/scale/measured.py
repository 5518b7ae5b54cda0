"""Throughput and CPU of real services on this machine, under the load of one generator.

For each number of shards there are as many service processes, with one Redis. A window of pushes of one cell (a number
of shards, a size, a number of workers) gives its pushes a second, the CPU that each of them cost generator, services
(the event loop's thread apart from the others) and Redis, and Redis's own account of its commands. Each round has a
window of every cell, in an order of its own, so that a slow spell of the machine is not of one cell, nor of cells that
are alike. All services are up at once, and are started anew for each round, since those of one start may all be a fifth
faster or slower than those of another. A figure is the median over the rounds.
"""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
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

__all__ = [
    "ALONE",
    "BUSY",
    "COSTS_ALONE",
    "SHARDS",
    "SIZES",
    "WORKERS",
    "Measured",
    "Point",
    "machine",
    "measure",
    "points_of",
]

SHARDS = (1, 2, 4)
SIZES = (100_000, 300_000, 1_000_000)
WORKERS = (1, 4, 16, 64, 256)
ALONE, BUSY = 1, 16
"""Workers of the points that costs are fitted on: of one, threads are idle before each thing they do."""
COSTS_ALONE: dict[int, dict[int, Sequence[int]]] = {
    min(SHARDS): {200_000: (ALONE, BUSY), 2_000_000: (ALONE, BUSY)},
    2: {50_000: (ALONE, BUSY, 256), 200_000: (ALONE, BUSY), 2_000_000: (ALONE, BUSY)},
    3: {100_000: (ALONE, BUSY, 256), 1_000_000: (ALONE, BUSY)},
    max(SHARDS): {
        50_000: (ALONE, BUSY, 256),
        200_000: (ALONE, BUSY),
        2_000_000: (ALONE, BUSY),
        5_000_000: (ALONE, BUSY),
    },
}
"""What is measured for the costs alone, besides: workers by sizes, by numbers of shards. Of many workers, models are so
small that pushes have their turn within the second after which they would ask for it again. One size of a shard and one
of the most are so large that updates have a thread of their own."""
ROUNDS, SECONDS, WARMUP_S = 7, 0.6, 0.3
QUICK_SIZES, QUICK_WORKERS, QUICK_ROUNDS = (100_000, 1_000_000), (ALONE, BUSY), 2

_SEED = 0


@dataclass(frozen=True)
class Cell:
    """What windows are of."""

    shards: int
    parameters: int
    workers: int


@dataclass(frozen=True)
class Point:
    """A cell's figures; all CPU is in seconds a push."""

    shards: int
    parameters: int
    workers: int
    pushes_per_s: float
    spread: float
    """Half the distance between the quartiles of the windows, in pushes a second."""
    push_s: float
    """The median of a push, as its worker waits for it."""
    staleness: float
    """The mean."""
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


@dataclass(frozen=True)
class Measured:
    """Points by shards, sizes and workers, and the windows that they are of, in the order in which they were taken.

    A window also has `loop_queued`: how long event loops waited for a core, in seconds a push.
    """

    points: list[Point]
    windows: list[dict[str, float]]


def measure(quick: bool) -> Measured:
    """The windows of all cells."""
    order, windows = random.Random(_SEED), list[dict[str, float]]()
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        windows += [{"round": number, **window} for window in _round(order, quick)]
    return Measured(points_of(windows), windows)


def _round(order: random.Random, quick: bool) -> Iterator[dict[str, float]]:
    """A window of each cell, of services that are started for them."""
    with ExitStack() as stack:
        sites = [stack.enter_context(_Site(shards)) for shards in sorted({*SHARDS, *COSTS_ALONE})]
        cells = [(site, cell) for site in sites for cell in site.prepare(_sizes(site.shards, quick))]
        order.shuffle(cells)
        for site, cell in cells:
            yield {**asdict(cell), **site.window(cell)}


def _sizes(shards: int, quick: bool) -> dict[int, Sequence[int]]:
    """Numbers of workers by the size of a model."""
    judged = dict.fromkeys(QUICK_SIZES, QUICK_WORKERS) if quick else dict.fromkeys(SIZES, WORKERS)
    return (judged if shards in SHARDS else {}) | COSTS_ALONE.get(shards, {})


def points_of(windows: Iterable[dict[str, float]]) -> list[Point]:
    """The figures of each cell, by shards, sizes and workers."""
    by_cell: dict[tuple[float, ...], list[dict[str, float]]] = {}
    for window in windows:
        cell = window["shards"], window["parameters"], window["workers"]
        by_cell.setdefault(cell, []).append(window)
    return [Point(**_figures(by_cell[cell])) for cell in sorted(by_cell)]


def _figures(windows: Sequence[dict[str, float]]) -> dict[str, Any]:
    names = Point.__dataclass_fields__.keys() & windows[0].keys()
    found: dict[str, Any] = {name: median(each[name] for each in windows) for name in names}
    cell = {name: int(found[name]) for name in ("shards", "parameters", "workers")}
    return {**found, **cell, "spread": spread([each["pushes_per_s"] for each in windows])}


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


class _Site:
    """The services of one number of shards, their Redis, and a generator for each size; a context manager."""

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self._stack = ExitStack()
        self._generators: dict[int, Generator] = {}

    def __enter__(self) -> _Site:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="freestep-bench-"))
            redis_url = stack.enter_context(embedded_store(Path(folder)))
            self._store = stack.enter_context(Redis.from_url(redis_url, decode_responses=True))
            shared = {"redis_url": redis_url, "checkpoint_url": f"{folder}/checkpoints"}
            self._services: list[Service] = [stack.enter_context(running_service(**shared)) for _ in range(self.shards)]
            self._client = stack.enter_context(Client(self._services[0].url))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def prepare(self, sizes: dict[int, Sequence[int]]) -> list[Cell]:
        """Makes a run of each size, whose workers hold their leases and some have pushed; the cells of all."""
        for parameters, numbers in sizes.items():
            run = self._client.run(f"scale-{parameters}")
            place(run, self._services, parameters, self.shards)
            generator = self._stack.enter_context(Generator(run, self._services[0].url, self.shards))
            generator.join(max(numbers))
            generator.push(min(BUSY, max(numbers)), WARMUP_S, WARMUP_S, lambda: None)
            self._generators[parameters] = generator
        return [Cell(self.shards, size, workers) for size, numbers in sizes.items() for workers in numbers]

    def window(self, cell: Cell) -> dict[str, float]:
        """What a window of pushes took."""
        redis_pid = self._store.info("server")["process_id"]
        borders: list[_Used] = []

        def at_border() -> None:
            borders.append(_used([service.pid for service in self._services], redis_pid, self._store))

        taken, length = self._generators[cell.parameters].push(cell.workers, WARMUP_S, SECONDS, at_border)
        before, after = borders
        pushes = len(taken.seconds)
        each = {name: (value - asdict(before)[name]) / pushes for name, value in asdict(after).items()}
        parts = ("generator_cpu", "loop_cpu", "update_cpu", "redis_cpu")
        return {
            "pushes_per_s": pushes / length,
            "push_s": median(taken.seconds),
            "staleness": mean(taken.staleness) if taken.staleness else 0.0,
            **{name: each[name] for name in (*parts, "loop_queued")},
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
    loop_queued: float
    update_cpu: float
    redis_cpu: float
    redis_calls: float
    redis_us: float
    all_cpu: float
    """Of everybody on the machine."""


def _used(pids: Sequence[int], redis_pid: int, store: Redis) -> _Used:
    loops, queued = map(sum, zip(*map(_first_thread_seconds, pids), strict=True))
    called = store.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "usec": 0})
    return _Used(
        time.process_time(),
        loops,
        queued,
        sum(map(cpu_seconds, pids)) - loops,
        cpu_seconds(redis_pid),
        called["calls"],
        called["usec"],
        _all_cpu(),
    )


def _all_cpu() -> float:
    times = psutil.cpu_times()
    seconds: float = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    return seconds


def _first_thread_seconds(pid: int) -> tuple[float, float]:
    """What a process's first thread has used so far, and how long it was ready and waited for a core."""
    used, queued, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(used) / 1e9, int(queued) / 1e9
