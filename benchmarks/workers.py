"""Many workers beside few: throughput, the service's memory, and how evenly pushes are served.

Windows of few and of many workers alternate. Workers are threads of two processes, each with a connection of its own;
they do nothing but push, and share the machine's cores with the service.
"""

from __future__ import annotations

from statistics import median, quantiles

from benchmarks.crew import Crew
from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.worker import new_run
from freestep import Client

PARAMETERS = 1_000_000
FEW, MANY = 4, 64
WINDOWS, SECONDS = 5, 5.0
QUICK_WINDOWS, QUICK_SECONDS = 2, 1.0

LEAST_RATE, MOST_TAIL = 0.9, 5.0
MOST_GROWTH_MB = 4 * 4 * PARAMETERS / 1e6 + (MANY - FEW) * 0.25
"""The vectors that a run may hold in flight, batch + 3, were they all new; and a quarter of a megabyte for what a
connection is made of."""


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    ratios, rates, tails, growths = [], [], [], []
    with running_service() as service, Client(service.url) as client:
        run = new_run(client, "workers", PARAMETERS)
        with Crew(service.url, run.name) as crew:
            crew.push(FEW, seconds)
            before = service.peak_memory()
            for _ in range(windows):
                few, many = crew.push(FEW, seconds), crew.push(MANY, seconds)
                ratios.append(many.rate / few.rate)
                rates.append(many.rate)
                tails.append(quantiles(many.pushes, n=100)[-1] / median(many.pushes))
                growths.append((service.peak_memory() - before) / 1e6)
    name = f"{PARAMETERS / 1e6:g}M, {MANY} workers"
    return Report(
        [
            Figure.of(f"{name}, pushes", rates, "/s"),
            Figure.of(f"{name}, pushes, of {FEW} workers'", ratios, "×", least=LEAST_RATE),
            Figure.of(f"{name}, p99 of p50", tails, "×", most=MOST_TAIL),
            # It only ever rises, so the last is the whole of it.
            Figure(f"{name}, the service's memory beyond {FEW} workers'", growths[-1], 0.0, "MB", most=MOST_GROWTH_MB),
        ],
        [f"workers are threads of 2 processes; windows of {seconds:g} s with {FEW} and {MANY} of them alternate"],
    )
