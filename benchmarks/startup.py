"""How long it takes to start: from `freestep serve` to ready, and from there to the first push that was applied."""

from __future__ import annotations

import time

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import Worker, new_run
from freestep import Client

PARAMETERS = 1_000_000
RUNS, QUICK_RUNS = 5, 2
MOST_READY_S, MOST_APPLIED_S = 4.0, 1.0


def report(options: Options) -> Report:
    ready, applied = [], []
    for _ in range(QUICK_RUNS if options.quick else RUNS):
        began = time.perf_counter()
        with running_service() as service, Client(service.url) as client:
            ready.append(time.perf_counter() - began)
            began = time.perf_counter()
            with Worker(new_run(client, "startup", PARAMETERS)) as worker:
                worker.push()
                applied.append(time.perf_counter() - began)
    return Report(
        [
            Figure.of("freestep serve to ready", ready, "s", most=MOST_READY_S),
            Figure.of(f"then to the first push of {PARAMETERS / 1e6:g}M applied", applied, "s", most=MOST_APPLIED_S),
        ],
        ["ready is /readyz; then a run is created and given its weights, and a worker takes a lease and pushes"],
    )
