"""The compiled loops against the same rules in fp64, for all lengths, shard boundaries, threads and dtypes."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import lru_cache

import pytest
import torch

from forms import FORMS
from freestep_service.optimizers import gather, square_sum
from freestep_service.optimizers.kernels import points, sweep
from freestep_service.optimizers.kernels.slices import MIN_SLICE
from stretch import LARGE, SIZES, USUAL, Stretch, random_vector

RARE = [form for form in FORMS if form not in USUAL]
LARGE_BY_THREADS = [(LARGE, threads) for threads in (1, 2, 3)]


@pytest.mark.parametrize(("numel", "threads"), SIZES, indirect=["threads"])
@pytest.mark.parametrize("form", USUAL)
def test_a_common_compiled_rule_equals_the_rule_in_fp64(form: str, numel: int, threads: int) -> None:
    compare_with_fp64(form, numel, atol=1e-6)


@pytest.mark.parametrize("form", RARE)
def test_any_compiled_rule_equals_the_rule_in_fp64(form: str) -> None:
    compare_with_fp64(form, 1000, atol=5e-6)


def compare_with_fp64(form: str, numel: int, atol: float) -> None:
    exact, compiled = stepped_in_fp64(form, numel), Stretch(form, random_vector(numel, 2), 0, numel)
    for seed in range(3, 9):
        gradient = random_vector(numel, seed)
        kept = gradient.clone()
        compiled.step(gradient)
        assert torch.equal(gradient, kept)
    assert compiled.scalars == exact.scalars
    for name, buffer in compiled.buffers.items():
        torch.testing.assert_close(buffer, exact.buffers[name].float(), rtol=2e-6, atol=atol)
    for point in ("x", "y", "z"):
        torch.testing.assert_close(
            compiled.point(point, torch.float32), exact.point(point, torch.float64).float(), rtol=2e-6, atol=atol
        )


@lru_cache(maxsize=1)
def stepped_in_fp64(form: str, numel: int) -> Stretch:
    """The same for any number of threads, which are tried one after another."""
    made = Stretch(form, random_vector(numel, 2).double(), 0, numel)
    for seed in range(3, 9):
        made.step(random_vector(numel, seed).double())
    return made


@pytest.mark.parametrize(("numel", "threads"), [(17, 1), (1000, 1), *LARGE_BY_THREADS], indirect=["threads"])
@pytest.mark.parametrize("form", USUAL)
def test_shards_of_a_common_rule_equal_the_whole(form: str, numel: int, threads: int) -> None:
    compare_with_parts(form, numel)


@pytest.mark.parametrize("form", RARE)
def test_shards_of_any_rule_equal_the_whole(form: str) -> None:
    compare_with_parts(form, 1000)


def compare_with_parts(form: str, numel: int) -> None:
    """Bit for bit: an element's result does not depend on its place in a vector."""
    weights = random_vector(numel, 2)
    whole = Stretch(form, weights, 0, numel)
    bounds = sorted({0, 1, 4, 7, numel // 3, numel // 2 + 3, numel - 1, numel})
    parts = [Stretch(form, weights, begin, end) for begin, end in itertools.pairwise(bounds)]
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


@pytest.mark.parametrize(("numel", "threads"), SIZES, indirect=["threads"])
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
@pytest.mark.parametrize(("numel", "threads"), [(17, 1), *LARGE_BY_THREADS], indirect=["threads"])
@pytest.mark.parametrize("form", USUAL)
def test_a_step_converts_and_gathers_within_its_pass(form: str, numel: int, dtype: torch.dtype, threads: int) -> None:
    """Bit for bit like conversion to fp32, and gathering of a group's last push, in passes of their own."""
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
def test_torch_converts_and_gathers_alike(form: str) -> None:
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
def test_an_element_that_is_not_finite_affects_no_other(form: str) -> None:
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


@pytest.mark.parametrize(("numel", "threads"), SIZES, indirect=["threads"])
def test_squares_are_summed_in_fp64(numel: int, threads: int) -> None:
    vector = random_vector(numel, 4)
    whole, middle = square_sum(vector), numel // 3
    assert whole == pytest.approx(float(vector.double().square().sum()), rel=1e-13)
    assert square_sum(vector[:middle]) + square_sum(vector[middle:]) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, MIN_SLICE, 2 * MIN_SLICE])
def test_the_sum_of_squares_is_finite_where_all_elements_are(value: float, place: int, threads: int) -> None:
    vector = torch.full((2 * MIN_SLICE + 1,), torch.finfo(torch.float32).max)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(square_sum(vector))
        vector[place] = value
        assert not math.isfinite(square_sum(vector))
