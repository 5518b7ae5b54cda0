"""Loops are compiled before any push, and once where machine code can be kept on disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from numba.core import event

from forked import Script
from forms import FORMS, hyperparameters
from freestep.api.models import ParameterSpec
from freestep.wire.encoding import INT8
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import (
    Blocks,
    Gradient,
    Quanta,
    Quantized,
    gather,
    method_of,
    quantize,
    square_sum,
    step,
    widen,
)
from freestep_service.optimizers.kernels import sweep
from freestep_service.optimizers.readiness import DTYPES, compile_loops, compile_rule
from plain_calls import Api
from stretch import USUAL, Stretch, random_vector


def test_no_push_waits_for_a_compiler() -> None:
    compile_loops()
    forms = [*USUAL, "adamw-ema", "schedule_free_wrapper-rmsprop"]
    for form in forms:
        compile_rule(hyperparameters(form), gathers=True)
    wide = torch.ones(9)
    manifest = Manifest([ParameterSpec(name="w", shape=(9,))])
    blocks = Blocks.of(manifest, INT8)
    int8 = Quanta(torch.empty(9, dtype=torch.int8), torch.empty(1), blocks)
    with event.install_recorder("numba:compile") as compilations:
        for form in forms:
            stretch = Stretch(form, random_vector(9, 0), 0, 9)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                stretch.step(random_vector(9, 1).to(dtype))
                stretch.step(random_vector(9, 1).to(dtype), 0.5, wide)
            for point, dtype in itertools.product("xyz", (torch.float32, torch.bfloat16, torch.float16)):
                stretch.point(point, dtype)
            for point in ("x", "y"):
                quantize(
                    stretch.method,
                    stretch.layout,
                    stretch.hyperparameters,
                    stretch.scalars,
                    stretch.buffers,
                    point,
                    int8,
                )
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for first in (True, False):
                gather(wide, random_vector(9, 1).to(dtype), 0.5, first=first)
            square_sum(wide.to(dtype))
        for dtype in (torch.bfloat16, torch.float16):
            widen(wide.to(dtype), wide)
        came = Quantized(manifest.slots, [wide.to(torch.int8)], [torch.ones(1)], 256)
        step(
            stretch.method,
            stretch.layout,
            stretch.hyperparameters,
            stretch.scalars,
            stretch.buffers,
            Gradient(came),
        )
        gather(wide, came, 0.5, first=False)
        came.square_sum()
    assert not compilations.buffer


def test_the_start_compiles_the_usual_rules_and_a_run_its_own(api: Api) -> None:
    sweep._loop.cache_clear()
    compile_loops()

    def ready(form: str) -> list[bool]:
        """Whether loops are compiled: for each dtype alone, and in a group."""
        method = method_of(hyperparameters(form))
        loops = [(method.rule, len(method.buffers), dtype, gathered) for gathered in (False, True) for dtype in DTYPES]
        return [bool(sweep._loop(*loop).signatures) for loop in loops]  # type: ignore[attr-defined]

    rare = "schedule_free_wrapper-rprop"
    assert all(all(ready(form)) for form in USUAL)
    assert not any(ready(rare))
    api.create(optimizer=FORMS[rare], aggregation={"policy": "async"})
    assert ready(rare) == [True] * 3 + [False] * 3
    assert api.push(api.lease(), 0).json()["decision"] == "applied"
    api.http.delete(api.path())
    api.create(optimizer=FORMS[rare], aggregation={"policy": "buffered", "batch": 2})
    assert all(ready(rare))


SUM_ONCE = """
import sys, warnings
import torch
from numba.core import event
warnings.simplefilter("error")
# The place for machine code is chosen when the loops are imported.
for name in [name for name in sys.modules if name.startswith("freestep_service")]:
    del sys.modules[name]
from freestep_service.optimizers import square_sum
with event.install_recorder("numba:compile") as compilations:
    assert square_sum(torch.ones(3)) == 3
print(len(compilations.buffer), flush=True)
"""


def test_machine_code_is_kept_where_there_is_a_place_for_it(tmp_path: Path) -> None:
    def compilations(folder: Path | str) -> int:
        with Script(SUM_ONCE, NUMBA_CACHE_DIR=str(folder)) as script:
            count = int(script.read_line())
            assert script.wait() == 0
        return count

    assert compilations(tmp_path) > 0
    assert compilations(tmp_path) == 0
    assert compilations("/dev/null/nowhere") > 0
