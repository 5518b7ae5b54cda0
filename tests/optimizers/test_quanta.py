"""Points as int8: the compiled pass and torch's equal the plain encoding, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import encoded
from freestep.api.hyperparameters import SGDScheduleFree
from freestep.api.models import ParameterSpec
from freestep.wire.encoding import INT8
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Blocks, Quanta, initial_buffers, interpolate, method_of, quantize, segments
from freestep_service.optimizers.kernels import quanta
from freestep_service.optimizers.kernels.slices import MIN_SLICE

SHAPES: list[dict[str, tuple[int, ...]]] = [
    {"s": ()},
    {"e": (0, 4)},
    {"w": (256,)},
    {"w": (255,), "v": (257,)},
    {"e": (0, 4), "w": (40, 33), "s": (), "m": (3, 256), "n": (512,), "f": (0,), "b": (7,)},
    {"l": (MIN_SLICE + 1,), "m": (2, MIN_SLICE), "b": (300,)},
]
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
METHOD = method_of(SGDScheduleFree())
HYPERPARAMETERS = {name: SGDScheduleFree(momentum=momentum) for name, momentum in (("default", 0.9), ("odd", 0.6))}
SCALARS = {name: METHOD.initial for name in HYPERPARAMETERS}


@pytest.fixture(params=["compiled", "by torch"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by torch":
        monkeypatch.setattr(quanta, "is_compiled", lambda _: False)
        # Of a few blocks each.
        monkeypatch.setattr(quanta, "CHUNK", 1000)
    return str(request.param)


def manifest_of(shapes: dict[str, tuple[int, ...]]) -> Manifest:
    """A manifest in which every other tensor is of the group `odd`."""
    groups = ("default", "odd")
    return Manifest(
        [ParameterSpec(name=name, shape=shape, group=groups[at % 2]) for at, (name, shape) in enumerate(shapes.items())]
    )


def quantized(manifest: Manifest, buffers: dict[str, Tensor], point: str) -> dict[str, Tensor]:
    """A point's items, as a body names them."""
    blocks = Blocks.of(manifest, INT8)
    junk = torch.full((manifest.numel,), 99, dtype=torch.int8), torch.full((len(blocks.bounds) - 1,), 9.0)
    out = Quanta(*junk, blocks)
    quantize(METHOD, segments(manifest.slots), HYPERPARAMETERS, SCALARS, buffers, point, out)  # type: ignore[arg-type]
    counts = [INT8.blocks(slot) for slot in manifest.slots]
    assert len(out.scales) == sum(counts)
    items = {}
    for slot, scales in zip(manifest.slots, out.scales.split(counts), strict=True):
        items[slot.name] = out.quanta[slot.offset : slot.offset + slot.numel].view(slot.shape)
        items[f"{slot.name}::scale"] = scales
    return items


def assert_is_the_plain_one(items: dict[str, Tensor], manifest: Manifest, vector: Tensor) -> None:
    tensors = {slot.name: vector[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in manifest.slots}
    expected, _ = encoded.int8(tensors)
    assert items.keys() == expected.keys()
    for name, item in items.items():
        torch.testing.assert_close(item, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("point", ["x", "y", "z"])
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda shapes: "-".join(shapes))
def test_a_point_equals_the_fp32_one_in_int8(
    shapes: dict[str, tuple[int, ...]], point: str, execution: str, threads: int
) -> None:
    manifest = manifest_of(shapes)
    generator = torch.Generator().manual_seed(5)
    buffers = initial_buffers(METHOD, torch.randn(manifest.numel, generator=generator))
    buffers["z"] += torch.randn(manifest.numel, generator=generator)
    wide = torch.empty(manifest.numel)
    interpolate(METHOD, segments(manifest.slots), HYPERPARAMETERS, SCALARS, buffers, point, wide)  # type: ignore[arg-type]
    assert_is_the_plain_one(quantized(manifest, buffers, point), manifest, wide)


def random(numel: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(numel, generator=torch.Generator().manual_seed(numel))


VECTORS = {
    "zeros": torch.zeros(300),
    "negative-zeros": -torch.zeros(300),
    "zeros-but-for-one": torch.cat([torch.zeros(299), torch.tensor([-3.0])]),
    "equal": torch.full((300,), -0.1),
    "halfway": torch.cat([torch.tensor([127.0]), torch.arange(299) % 254 - 126.5]),
    "whole": (torch.arange(300) % 255 - 127) / 4,
    "least": torch.tensor([1e-45, -1e-45, 0.0]),
    "subnormal": random(300, 1e-39),
    "hardly-normal": random(300, 1e-37),
    "quanta-that-are-subnormal": random(300, 127 * TINY),
    "scales-about-the-least": torch.linspace(0.5, 2, 300) * 127 * TINY,
    "of-all-sizes": torch.logspace(-44, 38, 300) * (-1) ** torch.arange(300),
    "greatest": torch.tensor([HUGE, -HUGE, HUGE / 2, 1.0]),
    "about-the-greatest": HUGE * (1 - torch.arange(300) * 2.0**-24),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_block_of_any_finite_numbers_decodes_to_finite_ones(name: str, execution: str) -> None:
    vector = VECTORS[name]
    manifest = manifest_of({"w": tuple(vector.shape)})
    items = quantized(manifest, {"y": vector}, "y")
    assert_is_the_plain_one(items, manifest, vector)
    decoded = encoded.decoded(items, INT8.metadata(), {"w": vector.shape})["w"]
    assert decoded.isfinite().all()
    scales = items["w::scale"].double().repeat_interleave(256)[: vector.numel()]
    # In fp64, where the bound itself is not rounded; the quotient is rounded before it is rounded to a quantum.
    assert ((decoded.double() - vector.double()).abs() <= scales * (0.5 + 127 * 2.0**-23)).all()
    assert not decoded[(vector == 0)].any()
    assert (items["w"].abs() <= 127).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_decodes_to_nan(value: float, execution: str) -> None:
    vector = random(600)
    vector[[256, 300]] = torch.tensor([value, -value])
    manifest = manifest_of({"w": (600,)})
    items = quantized(manifest, {"y": vector}, "y")
    assert_is_the_plain_one(items, manifest, vector)
    decoded = encoded.decoded(items, INT8.metadata(), {"w": (600,)})["w"]
    assert decoded[256:512].isnan().all()
    assert decoded[:256].isfinite().all() and decoded[512:].isfinite().all()
