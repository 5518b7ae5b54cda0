"""The compiled loops against the same rules in fp64, whatever the length, the cuts, the threads and the dtype."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from numba.core import event
from torch import Tensor

from forms import FORMS, hyperparameters, own
from freestep.encoding import INT8
from freestep.hyperparameters import SGD
from freestep.manifest import Manifest
from freestep.models import ParameterSpec
from freestep_service.optimizers import (
    Blocks,
    Conditions,
    Gradient,
    Quanta,
    Quantized,
    Segment,
    gather,
    initial_buffers,
    interpolate,
    method_of,
    points,
    quantize,
    square_sum,
    step,
    sweep,
    widen,
)
from freestep_service.optimizers.readiness import DTYPES, compile_loops, compile_rule
from freestep_service.optimizers.slices import LEAST
from plain_calls import Api

USUAL = ["sgd_schedule_free", "adamw_schedule_free", "radam_schedule_free", "sgd", "adamw"]
"""Forms whose rules are compiled at the start, and are tried at all sizes."""
RARE = [form for form in FORMS if form not in USUAL]
SIZES = [0, 1, 7, 15, 16, 17, 1000, 2 * LEAST - 1, 2 * LEAST, 3 * LEAST + 17]
"""Around the width of vector instructions, and where a second thread is given a slice."""


def random_vector(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


class Stretch:
    """Elements `begin` to `end` of a run whose groups alternate, as the shard that has them steps."""

    def __init__(self, form: str, weights: Tensor, begin: int, end: int) -> None:
        chosen = hyperparameters(form)
        self.begin, self.end, self.method = begin, end, method_of(chosen)
        numel = weights.numel()
        edges = sorted({0, numel // 3, numel // 2 + 1, min(numel // 2 + 4, numel), numel} & set(range(numel + 1)))
        self.layout = [
            Segment(group, max(first, begin) - begin, min(last, end) - begin)
            for (first, last), group in zip(itertools.pairwise(edges), itertools.cycle(("even", "odd")))
            if max(first, begin) < min(last, end)
        ]
        self.hyperparameters = {"even": chosen, "odd": chosen.overruled(own(form, lr=0.1, weight_decay=0.3))}
        self.buffers = initial_buffers(self.method, weights[begin:end].clone())
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)

    def step(self, pushed: Tensor, share: float = 1.0, gathered: Tensor | None = None) -> None:
        part = slice(self.begin, self.end)
        gradient = Gradient(pushed[part], 0.3, share, None if gathered is None else gathered[part])
        self.scalars = step(
            self.method,
            self.layout,
            self.hyperparameters,
            self.scalars,
            self.buffers,
            gradient,
            Conditions(0.7, expected_staleness=3.0),
        )

    def point(self, name: str, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.end - self.begin, dtype=dtype)
        interpolate(self.method, self.layout, self.hyperparameters, self.scalars, self.buffers, name, out)  # type: ignore[arg-type]
        return out


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("form", USUAL)
def test_a_compiled_rule_is_the_rule_in_fp64(form: str, numel: int, threads: int) -> None:
    compare_with_fp64(form, numel, atol=1e-6)


@pytest.mark.parametrize("form", RARE)
def test_any_compiled_rule_is_the_rule_in_fp64(form: str) -> None:
    compare_with_fp64(form, 1000, atol=5e-6)


def compare_with_fp64(form: str, numel: int, atol: float) -> None:
    weights = random_vector(numel, 2)
    compiled, exact = (Stretch(form, each, 0, numel) for each in (weights, weights.double()))
    for seed in range(3, 9):
        gradient = random_vector(numel, seed)
        kept = gradient.clone()
        compiled.step(gradient)
        exact.step(gradient.double())
        assert torch.equal(gradient, kept)
    assert compiled.scalars == exact.scalars
    for name, buffer in compiled.buffers.items():
        torch.testing.assert_close(buffer, exact.buffers[name].float(), rtol=2e-6, atol=atol)
    for point in ("x", "y", "z"):
        torch.testing.assert_close(
            compiled.point(point, torch.float32), exact.point(point, torch.float64).float(), rtol=2e-6, atol=atol
        )


@pytest.mark.parametrize("numel", [17, 1000, 3 * LEAST + 17])
@pytest.mark.parametrize("form", USUAL)
def test_where_a_vector_is_cut_does_not_show(form: str, numel: int, threads: int) -> None:
    compare_with_parts(form, numel)


@pytest.mark.parametrize("form", RARE)
def test_where_a_vector_is_cut_shows_in_no_rule(form: str) -> None:
    compare_with_parts(form, 1000)


def compare_with_parts(form: str, numel: int) -> None:
    """N shards are one, bit for bit: an element's result has nothing to do with its place."""
    weights = random_vector(numel, 2)
    whole = Stretch(form, weights, 0, numel)
    cuts = sorted({0, 1, 4, 7, numel // 3, numel // 2 + 3, numel - 1, numel})
    parts = [Stretch(form, weights, begin, end) for begin, end in itertools.pairwise(cuts)]
    for seed in range(3, 9):
        gradient = random_vector(numel, seed)
        for each in (whole, *parts):
            each.step(gradient)
    for name, buffer in whole.buffers.items():
        assert torch.equal(buffer, torch.cat([part.buffers[name] for part in parts]))
    for point, dtype in itertools.product("xyz", (torch.float32, torch.bfloat16, torch.float16)):
        assert torch.equal(whole.point(point, dtype), torch.cat([part.point(point, dtype) for part in parts]))


@pytest.mark.parametrize("form", FORMS)
def test_torch_evaluates_a_rule_a_chunk_at_a_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the intermediate results of a whole model would not fit."""
    weights, gradient = (random_vector(67, seed).double() for seed in range(2))
    whole, chunked = (Stretch(form, weights, 0, 67) for _ in range(2))
    whole.step(gradient)
    before = [whole.point(name, torch.float64) for name in "xyz"]
    for module in (sweep, points):
        monkeypatch.setattr(module, "CHUNK", 5)
    chunked.step(gradient)
    for name, buffer in whole.buffers.items():
        assert torch.equal(buffer, chunked.buffers[name])
    for name, expected in zip("xyz", before, strict=True):
        assert torch.equal(chunked.point(name, torch.float64), expected)


@pytest.mark.parametrize("numel", SIZES)
def test_gathering_is_a_weighted_sum(numel: int, threads: int) -> None:
    gradients = [random_vector(numel, seed) for seed in range(3)]
    shares = [0.3, 7.0, 0.01]
    accumulated = torch.full((numel,), float("nan"))
    for number, (gradient, share) in enumerate(zip(gradients, shares, strict=True)):
        gather(accumulated, gradient, share, first=not number)
    expected = sum(share * gradient.double() for gradient, share in zip(gradients, shares, strict=True))
    torch.testing.assert_close(accumulated, torch.as_tensor(expected).float(), rtol=1e-5, atol=1e-6)
    in_parts = torch.full((numel,), float("nan"))
    for number, (gradient, share) in enumerate(zip(gradients, shares, strict=True)):
        for begin, end in itertools.pairwise(sorted({0, numel // 3, numel})):
            gather(in_parts[begin:end], gradient[begin:end], share, first=not number)
    assert torch.equal(in_parts, accumulated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [17, 3 * LEAST + 17])
@pytest.mark.parametrize("form", USUAL)
def test_a_step_reads_what_it_takes_as_it_came(form: str, numel: int, dtype: torch.dtype, threads: int) -> None:
    """As if what is narrow had been widened, and the last push of a group gathered, by passes of their own."""
    weights, gathered = random_vector(numel, 2), random_vector(numel, 3)
    fused, plain = (Stretch(form, weights, 0, numel) for _ in range(2))
    for seed in range(4, 7):
        pushed = random_vector(numel, seed).to(dtype)
        fused.step(pushed, 0.6)
        plain.step(0.6 * pushed.float())
        fused.step(pushed, 0.6, gathered)
        plain.step(gathered + 0.6 * pushed.float())
    for name, buffer in fused.buffers.items():
        assert torch.equal(buffer, plain.buffers[name])


@pytest.mark.parametrize("form", FORMS)
def test_torch_reads_what_it_takes_as_it_came(form: str) -> None:
    weights, gathered = random_vector(67, 2).double(), random_vector(67, 3).double()
    fused, plain = (Stretch(form, weights, 0, 67) for _ in range(2))
    pushed = random_vector(67, 4).bfloat16()
    for stretch, pushes in ((fused, (pushed, 0.6, gathered)), (plain, (gathered + 0.6 * pushed.double(),))):
        for buffer in stretch.buffers:
            stretch.buffers[buffer] = stretch.buffers[buffer].double()
        stretch.step(*pushes)
    for name, buffer in fused.buffers.items():
        torch.testing.assert_close(buffer, plain.buffers[name], rtol=1e-15, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_where_it_is(form: str) -> None:
    numel = 67
    plain, odd = (Stretch(form, random_vector(numel, 2), 0, numel) for _ in range(2))
    gradient = random_vector(numel, 3)
    plain.step(gradient)
    gradient[[0, 40, 66]] = torch.tensor([math.nan, math.inf, -math.inf])
    odd.step(gradient)
    touched = torch.zeros(numel, dtype=torch.bool)
    touched[[0, 40, 66]] = True
    assert not odd.buffers["y"][0].isfinite()
    for name, buffer in odd.buffers.items():
        assert torch.equal(buffer[~touched], plain.buffers[name][~touched])


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
import torch
from numba.core import event
from freestep_service.optimizers import square_sum
with event.install_recorder("numba:compile") as compilations:
    assert square_sum(torch.ones(3)) == 3
print(len(compilations.buffer))
"""


@pytest.mark.slow
def test_machine_code_is_kept_where_there_is_a_place_for_it(tmp_path: Path) -> None:
    def compilations(folder: Path | str) -> int:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
        return int(subprocess.check_output([sys.executable, "-W", "error", "-c", SUM_ONCE], env=environment))

    assert compilations(tmp_path) > 0
    assert compilations(tmp_path) == 0
    assert compilations("/dev/null/nowhere") > 0


EDGES = torch.tensor(
    [
        *(
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            -math.nan,
            3.4028235e38,
            -3.4028235e38,
            1e-45,
            -1e-45,
            1.1754944e-38,
        ),
        # The largest of F16 and BF16, what is just rounded to it, and what is just not.
        *(65504.0, 65519.996, 65520.0, -65520.0, 3.3895314e38, 3.3961775e38, 3.3961776e38),
        # F16's subnormals: the smallest, its half, which ties to 0, just above it, and where they end.
        *(5.9604645e-08, 2.9802322e-08, 2.9802326e-08, 6.1035156e-05, 6.097555e-05, 6.1005354e-05),
    ]
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_are_rounded_as_torch_rounds(dtype: torch.dtype, threads: int) -> None:
    every_half = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    bits = every_half.view(torch.int32)
    # Both neighbours of each number that 16 bits can hold, and of what lies halfway to the next.
    halfway = 2**15 if dtype == torch.bfloat16 else 2**12
    near = [(bits + offset).view(torch.float32) for offset in (-1, 1, halfway - 1, halfway, halfway + 1)]
    anywhere = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    y = torch.cat([EDGES, every_half, *near, anywhere.to(torch.int32).view(torch.float32)])
    out = torch.empty(y.numel(), dtype=dtype)
    interpolate(method_of(SGD()), [Segment("", 0, y.numel())], {"": SGD()}, {"": {}}, {"y": y}, "y", out)
    assert torch.equal(out.isnan(), y.isnan())
    number = ~y.isnan()
    assert torch.equal(out.view(torch.int16)[number], y.to(dtype).view(torch.int16)[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_widened_as_torch_widens(dtype: torch.dtype) -> None:
    halves = torch.arange(2**16).to(torch.uint16).view(dtype)
    out = torch.empty(halves.numel())
    assert not math.isfinite(widen(halves, out))
    assert torch.equal(out.isnan(), halves.isnan())
    number = ~halves.isnan()
    assert torch.equal(out.view(torch.int32)[number], halves.float().view(torch.int32)[number])


@pytest.mark.parametrize("numel", SIZES)
def test_squares_are_summed_in_fp64(numel: int, threads: int) -> None:
    vector = random_vector(numel, 4)
    whole, cut = square_sum(vector), numel // 3
    assert whole == pytest.approx(float(vector.double().square().sum()), rel=1e-13)
    assert square_sum(vector[:cut]) + square_sum(vector[cut:]) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, LEAST, 2 * LEAST])
def test_the_sum_is_finite_where_all_elements_are(value: float, place: int, threads: int) -> None:
    vector = torch.full((2 * LEAST + 1,), torch.finfo(torch.float32).max)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(square_sum(vector))
        vector[place] = value
        assert not math.isfinite(square_sum(vector))
