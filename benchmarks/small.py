"""A small model, whose push + pull is all fixed cost: one worker, in runs of many steps each.

Beside it, in the same runs, exchanges by FastAPI, uvicorn and httpx that nothing is done with: of the same bytes, and
of none. To that freestep adds a call of Redis, the checks and the update, and saves some of the bodies' way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.stack import stack_alone
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS = 100_000
RUNS, STEPS, WARMUP = 7, 1000, 50
QUICK_RUNS, QUICK_STEPS = 3, 100

MOST_P50_MS, MOST_P99_MS, LEAST_STEPS_PER_S = 1.2, 4.0, 700
MOST_OF_STACK = 1.5


def report(options: Options) -> Report:
    runs, steps = (QUICK_RUNS, QUICK_STEPS) if options.quick else (RUNS, STEPS)
    p50, p99, rates, empty, ratios = [], [], [], [], []
    with running_service() as service, Client(service.url) as client, stack_alone() as stack:
        with Worker(new_run(client, "small", PARAMETERS)) as worker:
            same, none = (partial(stack.exchange, bytes(size)) for size in (worker.bytes_moved // 2, 0))
            for subject in (worker.push, same, none):
                _milliseconds(subject, WARMUP)
            for _ in range(runs):
                began = time.perf_counter()
                pushes = _milliseconds(worker.push, steps)
                rates.append(steps / (time.perf_counter() - began))
                p50.append(median(pushes))
                p99.append(quantiles(pushes, n=100)[-1])
                ratios.append(p50[-1] / median(_milliseconds(same, steps)))
                empty.append(median(_milliseconds(none, steps)))
    name = f"{PARAMETERS / 1e6:g}M push + pull"
    return Report(
        [
            Figure.of(f"{name}, p50", p50, "ms", most=MOST_P50_MS),
            Figure.of(f"{name}, p99", p99, "ms", most=MOST_P99_MS),
            Figure.of(f"{name}, steps", rates, "/s", least=LEAST_STEPS_PER_S),
            Figure.of(f"{name}, p50, of an exchange of its bytes by the stack alone", ratios, "×", most=MOST_OF_STACK),
            Figure.of("an exchange of no bytes by the stack alone, p50", empty, "ms"),
        ]
    )


def _milliseconds(subject: Callable[[], float], times: int) -> list[float]:
    return [1e3 * subject() for _ in range(times)]
