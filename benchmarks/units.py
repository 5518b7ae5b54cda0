"""What units of data cost a worker: its steps in windows that alternate between with and without them.

Taking a unit includes the wait for a claim, where the stock is empty. Claims ahead, and what the service has to do for
a push that names a unit, are in the whole steps only, which see the rest of the machine too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import running_service
from freestep import RemoteOptimizer, Units

PARAMETERS = 100_000
WINDOWS, SECONDS = 15, 2.0
QUICK_WINDOWS, QUICK_SECONDS = 5, 0.5
MOST = 0.02


def report(options: Options) -> Report:
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    ratios, without_ms, shares = [], [], []
    with running_service() as service:
        with _optimizer(service.url, "without") as plain, _optimizer(service.url, "with") as handed:
            ranges = iter(Units(handed, 10_000_000, unit=1, passes=None))
            for optimizer in (plain, handed):
                _window(optimizer, ranges if optimizer is handed else None, 1.0)
            for number in range(windows):
                # Turn about, so that neither is always first.
                turns = [plain, handed] if number % 2 else [handed, plain]
                took = {each: _window(each, ranges if each is handed else None, seconds) for each in turns}
                ratios.append(took[handed][0] / took[plain][0])
                shares.append(took[handed][1] / took[handed][0])
                without_ms.append(1e3 * took[plain][0])
    name = f"a step of {PARAMETERS / 1e6:g}M parameters"
    return Report(
        [
            Figure.of(f"{name}, without units", without_ms, "ms"),
            Figure.of(f"{name}, with a unit for each, of that", ratios, "×"),
            Figure.of("taking a unit, of such a step", shares, "×", most=MOST),
        ],
    )


def _optimizer(url: str, run: str) -> RemoteOptimizer:
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(PARAMETERS, dtype=torch.float32, device="cpu"))})
    optimizer = RemoteOptimizer(model, url=url, run=run, algorithm="sgd", lr=1e-3, aggregation="async")
    model["w"].grad = torch.full((PARAMETERS,), 1e-3, dtype=torch.float32, device="cpu")
    return optimizer


def _window(optimizer: RemoteOptimizer, ranges: Iterator[range] | None, seconds: float) -> tuple[float, float]:
    """The mean seconds of a step over a window, and of these the seconds for a unit."""
    begun, steps, taking = time.perf_counter(), 0, 0.0
    while (took := time.perf_counter() - begun) < seconds:
        if ranges is not None:
            asked = time.perf_counter()
            next(ranges)
            taking += time.perf_counter() - asked
        optimizer.step()
        steps += 1
    return took / steps, taking / steps
