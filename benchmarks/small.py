"""A small model, whose push + pull is all fixed cost: one worker, in runs of many steps each."""

from __future__ import annotations

import time
from statistics import median, quantiles

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS = 100_000
RUNS, STEPS, WARMUP = 7, 1000, 50
QUICK_RUNS, QUICK_STEPS = 3, 100

MOST_P50_MS, MOST_P99_MS, LEAST_STEPS_PER_S = 1.2, 4.0, 700


def report(options: Options) -> Report:
    runs, steps = (QUICK_RUNS, QUICK_STEPS) if options.quick else (RUNS, STEPS)
    p50, p99, rates = [], [], []
    with running_service() as service, Client(service.url) as client:
        with Worker(new_run(client, "small", PARAMETERS)) as worker:
            for _ in range(WARMUP):
                worker.push()
            for _ in range(runs):
                began = time.perf_counter()
                milliseconds = [1e3 * worker.push() for _ in range(steps)]
                rates.append(steps / (time.perf_counter() - began))
                p50.append(median(milliseconds))
                p99.append(quantiles(milliseconds, n=100)[-1])
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, p50", p50, "ms", most=MOST_P50_MS),
            Figure.of(f"{name}, p99", p99, "ms", most=MOST_P99_MS),
            Figure.of(f"{name}, steps", rates, "/s", least=LEAST_STEPS_PER_S),
        ]
    )
