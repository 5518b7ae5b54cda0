"""What an update of five pushes costs a shard under each robust rule, beside that of their mean.

A group's five entries of the log are applied, as they are after their bodies were received: pushes are gathered or
kept apart, and the last one makes the step of AdamW Schedule-Free. Rounds alternate between the rules.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers.readiness import compile_loops
from freestep_service.state.compute import HOST
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard

PUSHES = 5
SIZES, ROUNDS = (1_000_000, 25_000_000), 7
QUICK_SIZES, QUICK_ROUNDS = (1_000_000,), 3
MEAN = "mean"
RULES: dict[str, dict[str, Any]] = {
    MEAN: {},
    "clip": {"robust": "clip"},
    "trimmed_mean": {"robust": "trimmed_mean", "beta": 0.2},
    "coordinate_median": {"robust": "coordinate_median"},
    "krum": {"robust": "krum", "f": 1},
}


def report(options: Options) -> Report:
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if options.quick else (SIZES, ROUNDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    compile_loops()
    figures, details = [], {}
    for numel in sizes:
        found = details[str(numel)] = measure(numel, rounds)
        name = f"{numel / 1e6:g}M, an update of {PUSHES} pushes"
        figures.append(Figure.of(f"{name}: {MEAN}", (1e3 * seconds for seconds in found[MEAN]), "ms"))
        for rule in list(RULES)[1:]:
            ratios = (mine / means for mine, means in zip(found[rule], found[MEAN], strict=True))
            figures.append(Figure.of(f"{name}: {rule}, of {MEAN}", ratios, "×"))
    torch.set_num_threads(threads)
    return Report(figures, details=details)


def measure(numel: int, rounds: int) -> dict[str, list[float]]:
    """By rule, the seconds of an update in each round."""
    generator = torch.Generator().manual_seed(0)
    pushes = [torch.randn(numel, generator=generator) for _ in range(PUSHES)]
    found: dict[str, list[float]] = {rule: [] for rule in RULES}
    # One shard at a time would see another machine than the next.
    updates = {rule: _update(rule, numel, pushes) for rule in RULES}
    gc.disable()
    try:
        for number in range(1 + rounds):
            for rule, update in updates.items():
                began = time.perf_counter()
                update()
                if number:
                    found[rule].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return found


def _update(rule: str, numel: int, pushes: list[torch.Tensor]) -> Callable[[], None]:
    """An update of a shard of its own."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "adamw_schedule_free", "lr": 1e-3},
            "aggregation": {"policy": "quorum", "batch": PUSHES, **RULES[rule]},
            "parameters": [{"name": "w", "shape": [numel]}],
        }
    )
    shard = Shard(spec, Manifest.of(spec), HOST)
    shard.prepare()
    shard.initialize(torch.zeros(numel), epoch=1)

    scale = 0.5 if rule == "clip" else 1.0

    def update() -> None:
        for number, push in enumerate(pushes, 1):
            entry = Entry(shard.seq + 1, 1, number == PUSHES, push, worker=str(number), scale=scale, norm=1.0)
            shard.apply(entry)

    return update
