"""An update alone, without any bytes that travel: what benchmarks.updates measures, beside what is to be reached."""

from __future__ import annotations

import gc
import os

import torch

from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.updates import FUSED, LEAST_SPEEDUP, MOST_OF_FUSED, OURS, PARAMETERS, ROUNDS, measure
from freestep_service.optimizers.readiness import compile_loops

QUICK_PARAMETERS, QUICK_ROUNDS = 5_000_000, 3


def report(options: Options) -> Report:
    parameters, rounds = (QUICK_PARAMETERS, QUICK_ROUNDS) if options.quick else (PARAMETERS, ROUNDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    compile_loops()
    found = measure(parameters, rounds)
    # The measurement has it stopped.
    gc.enable()
    torch.set_num_threads(threads)
    package = min((name for name in found if name.startswith("schedulefree")), key=lambda name: sum(found[name]))
    ours = found[OURS]
    speedups = (theirs / mine for theirs, mine in zip(found[package], ours, strict=True))
    of_fused = (mine / theirs for mine, theirs in zip(ours, found[FUSED], strict=True))
    name = f"{parameters / 1e6:g}M AdamW Schedule-Free"
    return Report(
        [
            Figure.of(name, (1e3 * seconds for seconds in ours), "ms"),
            Figure.of(f"{name}: the package's time, of ours", speedups, "×", least=LEAST_SPEEDUP),
            Figure.of(f"{name}, of torch's fused AdamW", of_fused, "×", most=MOST_OF_FUSED),
        ],
        [f"the package's faster setting was: {package}"],
        found,
    )
