"""Bodies of any encoding become the fp32 vector that they say, where they lie, and are measured on the way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from encoded import assemble, decoded, int8, topk
from freestep.encoding import ENCODINGS
from freestep.manifest import Manifest
from freestep.models import ParameterSpec
from freestep.wire import Receiver, lay
from freestep_service.measure import decode_and_measure
from freestep_service.optimizers.squares import CHUNK
from freestep_service.vectors import Vector

SIZES = [0, 1, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 17]
NAMES = {"first": "F32", "second": "BF16", "third": "F16", "fourth": "F32", "fifth": "F32"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def received(body: bytes, numel: int) -> tuple[Tensor, float | None]:
    """The flat tensor that a body becomes, and what is measured of it."""
    manifest = Manifest([ParameterSpec(name=name, shape=(numel,)) for name in NAMES])
    vector = Vector(manifest.numel)
    # What it held before must not show.
    vector.tensor().fill_(math.pi)
    receiver = Receiver(manifest, vector.bytes, len(body), encodings=ENCODINGS)
    lay(receiver, body)
    assert receiver.complete
    return decode_and_measure(vector, manifest, receiver)


def random_tensors(numel: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    return {name: torch.randn(numel, generator=generator) for name in NAMES}


def assert_measured(told: tuple[Tensor, float | None], expected: list[Tensor]) -> None:
    flat, norm = told
    assert torch.equal(flat, torch.cat(expected))
    assert norm == pytest.approx(float(torch.cat(expected).double().norm()), rel=1e-14)


@pytest.mark.parametrize("numel", SIZES)
def test_halves_are_widened(numel: int) -> None:
    tensors = {name: tensor.to(DTYPES[NAMES[name]]) for name, tensor in random_tensors(numel).items()}
    assert_measured(received(assemble(tensors, {}), numel), [tensor.float() for tensor in tensors.values()])


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("numel", SIZES)
def test_tensors_of_one_dtype_are_left_as_they_came(numel: int, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(numel).items()}
    told = received(assemble(tensors, {}), numel)
    assert told[0].dtype == dtype
    assert_measured(told, list(tensors.values()))


@pytest.mark.parametrize("block", [1, 3, 256, CHUNK, CHUNK + 1, 10**9])
@pytest.mark.parametrize("numel", SIZES)
def test_int8_is_multiplied_by_its_scales(numel: int, block: int) -> None:
    items, metadata = int8(random_tensors(numel), block)
    said = decoded(items, metadata, dict.fromkeys(NAMES, (numel,)))
    assert_measured(received(assemble(items, metadata), numel), list(said.values()))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("numel", SIZES)
def test_values_are_put_where_their_indices_say(numel: int, share: float) -> None:
    items, metadata = topk(random_tensors(numel), share, torch.float16, torch.int64)
    said = decoded(items, metadata, dict.fromkeys(NAMES, (numel,)))
    assert_measured(received(assemble(items, metadata), numel), list(said.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_norm(value: float) -> None:
    tensors = random_tensors(CHUNK + 5)
    tensors["fifth"][-1] = value
    for items, metadata in ((tensors, {}), topk({**tensors, "fifth": tensors["fifth"].nan_to_num()}, 1.0)):
        if metadata:
            items["fifth::values"][-1] = value
        assert received(assemble(items, metadata), CHUNK + 5)[1] is None
