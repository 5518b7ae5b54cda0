"""A gradient that stays int8 until a pass needs it, against its decoded fp32 elements."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from forms import hyperparameters
from freestep.api.hyperparameters import OptimizerSpec, ScheduleFreeWrapper
from freestep.api.models import ParameterSpec
from freestep.wire.encoding import INT8, Encoding
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import (
    Gradient,
    Quantized,
    gather,
    initial_buffers,
    method_of,
    segments,
    step,
)
from freestep_service.optimizers.kernels.gradient import PIECE
from freestep_service.optimizers.kernels.sums import gradient_sums

SHAPES = {
    "few": [(3,), (0,), (2, 5), (1,), (0,)],
    "blocks": [(256,), (4, 256)],
    "many": [(PIECE - 1,), (0,), (1,), (PIECE + 300,), (7,), (3, PIECE)],
}
BLOCKS = [1, 3, 256, PIECE + 1, 10**9]


@pytest.fixture(params=itertools.product(SHAPES, BLOCKS), ids=lambda param: f"{param[0]}-{param[1]}")
def both(request: pytest.FixtureRequest) -> tuple[Manifest, Quantized, Tensor]:
    """A manifest of two param groups, a gradient of it, and its decoded fp32 elements."""
    name, block = request.param
    return made(SHAPES[name], block)


def made(shapes: list[tuple[int, ...]], block: int) -> tuple[Manifest, Quantized, Tensor]:
    parameters = [
        ParameterSpec(name=str(number), shape=shape, group="even" if number % 2 else "odd")
        for number, shape in enumerate(shapes)
    ]
    manifest, generator = Manifest(parameters), torch.Generator().manual_seed(block)
    quanta = [torch.randint(-128, 128, (slot.numel,), generator=generator).to(torch.int8) for slot in manifest.slots]
    scales = [torch.rand(Encoding("int8", block).blocks(slot), generator=generator) for slot in manifest.slots]
    elements = [
        each.float() * scale.repeat_interleave(min(block, max(each.numel(), 1)))[: each.numel()]
        for each, scale in zip(quanta, scales, strict=True)
    ]
    return manifest, Quantized(manifest.slots, quanta, scales, block), torch.cat(elements)


def test_any_stretch_is_decoded(both: tuple[Manifest, Quantized, Tensor]) -> None:
    _, quantized, elements = both
    numel = elements.numel()
    assert quantized.numel() == numel
    edges = sorted({0, 1, 3, 4, 255, 256, 257, PIECE, numel // 2, numel - 1, numel} & set(range(numel + 1)))
    for begin, end in itertools.combinations_with_replacement(edges, 2):
        out = torch.full((end - begin + 1,), math.pi)
        assert torch.equal(quantized.decoded(begin, end, out), elements[begin:end])
        assert out[-1] == pytest.approx(math.pi)


def test_its_square_sum_is_that_of_its_elements(both: tuple[Manifest, Quantized, Tensor], threads: int) -> None:
    _, quantized, elements = both
    assert quantized.square_sum() == pytest.approx(float(elements.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("form", ["adamw_schedule_free", "sgd"])
def test_a_step_along_it_equals_one_along_its_elements(
    form: str, both: tuple[Manifest, Quantized, Tensor], threads: int
) -> None:
    compare_steps(hyperparameters(form), *both)


def test_directions_are_made_of_its_elements() -> None:
    muon = ScheduleFreeWrapper.model_validate({"base": {"algorithm": "muon"}})
    compare_steps(muon, *made([(30, 17), (4, 256)], 100))


def compare_steps(chosen: OptimizerSpec, manifest: Manifest, quantized: Quantized, elements: Tensor) -> None:
    """Bit for bit, of single pushes and of groups."""
    method, layout, groups = method_of(chosen), segments(manifest.slots), {"even": chosen, "odd": chosen}
    weights = torch.randn(manifest.numel, generator=torch.Generator().manual_seed(1))
    states, accumulators = [initial_buffers(method, weights.clone()) for _ in range(2)], [weights.clone(), weights]
    for pushed, buffers, accumulated in zip((quantized, elements), states, accumulators, strict=True):
        scalars = dict.fromkeys(groups, method.initial)
        gather(accumulated, pushed, 0.25, first=True)
        gather(accumulated, pushed, 0.5, first=False)
        for gradient in (Gradient(pushed, 0.3), Gradient(pushed, 0.5, 2.0, accumulated)):
            scalars = step(method, layout, groups, scalars, buffers, gradient)
    assert torch.equal(*accumulators)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_its_sums_are_those_of_its_elements(both: tuple[Manifest, Quantized, Tensor], threads: int) -> None:
    _, quantized, elements = both
    z, x, gathered = (torch.randn(elements.numel(), generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for before in (None, gathered):
        gradients = [Gradient(pushed, 0.5, 3.0, before) for pushed in (quantized, elements)]
        found, expected = (gradient_sums(gradient, z, x) for gradient in gradients)
        assert found == expected
        exact = [gradient.evaluated(torch.float64) for gradient in gradients]
        assert torch.equal(*exact)
        found, expected = (gradient_sums(gradient, z.double(), x.double()) for gradient in gradients)
        assert found == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("place", [0, 1, PIECE])
def test_its_square_sum_is_not_finite_where_an_element_is_not(value: float, place: int, threads: int) -> None:
    _, quantized, _ = made(SHAPES["many"], INT8.block)
    scales = [each.clone() for each in quantized.scales]
    slot = next(
        number for number, slot in enumerate(quantized.slots) if slot.offset <= place < slot.offset + slot.numel
    )
    number = (place - quantized.slots[slot].offset) // INT8.block
    scales[slot][number] = value
    # Of which 3e38 has a largest q that makes it infinite.
    quantized.quanta[slot][place - quantized.slots[slot].offset] = 127
    assert math.isfinite(quantized.square_sum())
    assert not math.isfinite(quantized._replace(scales=scales).square_sum())
