"""What an update costs on the host: `python -m benchmarks.updates`.

A step of each method over fp32 vectors in memory, beside one pass of as many bytes at the memory's copy bandwidth,
the `schedulefree` package and torch's fused AdamW, all with the same number of threads. Rounds alternate, so that all
see the same machine; figures are medians over the rounds, and a ratio is the median of each round's ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import schedulefree
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.floor import BYTES_PER_PARAMETER, copy_pass
from freestep.api.hyperparameters import ALGORITHMS, OptimizerSpec
from freestep_service.optimizers import Gradient, Scalars, Segment, initial_buffers, method_of, step
from freestep_service.optimizers.readiness import compile_loops

PARAMETERS = 25_000_000
ROUNDS = 15
WARMUP = 2
STEPS = 3
"""Steps of a round, which together are what is timed."""

OURS = "freestep adamw_schedule_free"
PACKAGE = "schedulefree AdamW, foreach"
FUSED = "torch AdamW, fused"
COPY = f"copying, {BYTES_PER_PARAMETER} bytes each"

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.9},
    "schedule_free_wrapper": {"base": {"algorithm": "rmsprop", "lr": 1e-3}},
}
"""Hyperparameters of algorithms that are not timed with a learning rate and else their defaults."""

LEAST_SPEEDUP, MOST_OF_FUSED = 3.0, 1.25
"""The bounds: of the package's time to ours, and of ours to that of torch's fused AdamW."""


@dataclass(frozen=True)
class Row:
    """Milliseconds of one step: the median and the spread between the quartiles; bytes read and written, a second."""

    name: str
    ms: float
    spread_ms: float
    gigabytes_s: float | None
    of_ours: float
    """This time to that of freestep's AdamW Schedule-Free."""


def chosen(algorithm: str) -> OptimizerSpec:
    """The hyperparameters of an algorithm that its update is timed with."""
    return ALGORITHMS[algorithm].model_validate(OPTIONS.get(algorithm, {"lr": 1e-3}))


def freestep(algorithm: str, gradient: Tensor, weights: Tensor) -> Callable[[], None]:
    """A step of freestep's, as a shard without param groups makes it."""
    hyperparameters = {"default": chosen(algorithm)}
    method, layout = method_of(hyperparameters["default"]), (Segment("default", 0, gradient.numel()),)
    buffers = initial_buffers(method, weights.clone())
    scalars: dict[str, Scalars] = {"default": method.initial}

    def work() -> None:
        nonlocal scalars
        scalars = step(method, layout, hyperparameters, scalars, buffers, Gradient(gradient))

    return work


def peer(make: Callable[..., Any], gradient: Tensor, weights: Tensor, **options: Any) -> Callable[[], None]:
    """A step of an optimizer of torch's kind."""
    parameter = nn.Parameter(weights.clone())
    parameter.grad = gradient
    optimizer = make([parameter], lr=1e-3, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()

    def work() -> None:
        optimizer.step()

    return work


def contestants(numel: int) -> dict[str, Callable[[], float]]:
    """By name, what gives the seconds of one step."""
    generator = torch.Generator().manual_seed(0)
    gradient, weights = (torch.randn(numel, generator=generator) for _ in range(2))
    works = {f"freestep {algorithm}": freestep(algorithm, gradient, weights) for algorithm in ALGORITHMS}
    works[PACKAGE] = peer(schedulefree.AdamWScheduleFree, gradient, weights, foreach=True)
    works["schedulefree AdamW, no foreach"] = peer(schedulefree.AdamWScheduleFree, gradient, weights, foreach=False)
    works[FUSED] = peer(torch.optim.AdamW, gradient, weights, fused=True)
    timed: dict[str, Callable[[], float]] = {COPY: lambda: copy_pass(numel)}

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            work()
        return (time.perf_counter() - began) / STEPS

    for name, work in works.items():
        timed[name] = lambda work=work: seconds(work)  # type: ignore[misc]
    return timed


def measure(numel: int, rounds: int) -> dict[str, list[float]]:
    """By name, the seconds of a step in each round."""
    timed = contestants(numel)
    found: dict[str, list[float]] = {name: [] for name in timed}
    gc.disable()
    try:
        for number in range(WARMUP + rounds):
            for name, seconds in timed.items():
                taken = seconds()
                if number >= WARMUP:
                    found[name].append(taken)
    finally:
        gc.enable()
    return found


def ratio(found: dict[str, list[float]], name: str, other: str) -> float:
    """The median, over the rounds, of one's time to the other's."""
    return median(mine / its for mine, its in zip(found[name], found[other], strict=True))


def bytes_per_parameter(name: str) -> int | None:
    """What is read and written of g and the state in one pass; None for those who take more than one."""
    if name in (COPY, FUSED):
        return BYTES_PER_PARAMETER
    if not name.startswith("freestep "):
        return None
    return 4 + 8 * len(method_of(chosen(name.removeprefix("freestep "))).buffers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="as the service's own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compile_loops()
    found = measure(options.parameters, options.rounds)
    rows = []
    for name, seconds in found.items():
        low, middle, high = quantiles(seconds, n=4)
        size = bytes_per_parameter(name)
        speed = size and size * options.parameters / middle / 1e9
        rows.append(Row(name, 1e3 * middle, 1e3 * (high - low), speed, ratio(found, name, OURS)))
    speedup = min(row.of_ours for row in rows if row.name.startswith("schedulefree"))
    of_fused = ratio(found, OURS, FUSED)
    if options.json:
        figures = {"threads": options.threads, "speedup_over_package": speedup, "of_fused": of_fused}
        print(json.dumps({**figures, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        title = f"a step of {options.parameters:,} parameters, {options.threads} threads"
        table = Table("", "ms", "spread", "GB/s", "ratio", title=title)
        for row in rows:
            speed = "" if row.gigabytes_s is None else f"{row.gigabytes_s:.1f}"
            table.add_row(row.name, f"{row.ms:.2f}", f"{row.spread_ms:.2f}", speed, f"{row.of_ours:.2f}")
        Console().print(table)
    if speedup < LEAST_SPEEDUP or of_fused > MOST_OF_FUSED:
        sys.exit(
            f"AdamW Schedule-Free takes 1/{speedup:.2f} of the package's time (bound: 1/{LEAST_SPEEDUP:g}) and "
            f"{of_fused:.2f} of fused AdamW's (bound: {MOST_OF_FUSED:g})"
        )


if __name__ == "__main__":
    main()
