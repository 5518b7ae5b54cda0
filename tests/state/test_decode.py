"""Bodies of any encoding are decoded to a vector, in place or on another device, and their norm is taken."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from encoded import assemble, decoded, int8, topk
from freestep.api.models import ParameterSpec
from freestep.wire.encoding import ENCODINGS
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from freestep_service.optimizers import Quantized
from freestep_service.optimizers.kernels import squares
from freestep_service.optimizers.kernels.squares import CHUNK
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import HOST
from freestep_service.state.decode import decode_and_measure

SIZES = [0, 1, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 17]
NAMES = {"first": "F32", "second": "BF16", "third": "F16", "fourth": "F32", "fifth": "F32"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


ELSEWHERE = torch.device("cpu", 0)
"""The host under another name than HOST's: bodies for it take the path of those for a GPU."""


@pytest.fixture(params=[HOST, ELSEWHERE], ids=["in place", "elsewhere"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that bodies are for; for ELSEWHERE torch decodes them, in pieces."""
    if request.param == ELSEWHERE:
        monkeypatch.setattr(squares, "is_compiled", lambda vector: False)
        monkeypatch.setattr(squares, "PIECE", CHUNK)
    return request.param  # type: ignore[no-any-return]


def received(body: bytes, numel: int, device: torch.device) -> tuple[Tensor, float | None]:
    """The flat tensor that a body is decoded to, and its norm."""
    manifest = Manifest([ParameterSpec(name=name, shape=(numel,)) for name in NAMES])
    vector = Vector(manifest.numel, device=device)
    # The vector's earlier content must not show.
    for memory in (vector.tensor(), vector.wide):
        memory.fill_(math.pi)
    receiver = Receiver(manifest, vector.bytes, len(body), encodings=ENCODINGS)
    lay(receiver, body)
    assert receiver.complete
    whole, norm = decode_and_measure(vector, manifest, receiver)
    if isinstance(whole, Quantized):
        elsewhere = whole.decoded(0, manifest.numel, torch.empty(manifest.numel))
        whole = whole.decoded(0, manifest.numel, vector.tensor())
        assert torch.equal(whole, elsewhere)
    return whole, norm


def random_tensors(numel: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    return {name: torch.randn(numel, generator=generator) for name in NAMES}


def assert_measured(told: tuple[Tensor, float | None], expected: list[Tensor]) -> None:
    flat, norm = told
    assert torch.equal(flat, torch.cat(expected))
    assert norm == pytest.approx(float(torch.cat(expected).double().norm()), rel=1e-14)


@pytest.mark.parametrize("numel", SIZES)
def test_halves_are_widened(numel: int, device: torch.device) -> None:
    tensors = {name: tensor.to(DTYPES[NAMES[name]]) for name, tensor in random_tensors(numel).items()}
    assert_measured(received(assemble(tensors, {}), numel, device), [tensor.float() for tensor in tensors.values()])


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("numel", SIZES)
def test_tensors_of_one_dtype_are_left_as_they_came(numel: int, dtype: torch.dtype, device: torch.device) -> None:
    """Except for another device, where they are widened after the copy."""
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(numel).items()}
    told = received(assemble(tensors, {}), numel, device)
    left = dtype if device == HOST else torch.float32
    assert told[0].dtype == left
    assert_measured(told, [tensor.to(left) for tensor in tensors.values()])


@pytest.mark.parametrize("block", [1, 3, 256, CHUNK, CHUNK + 1, 10**9])
@pytest.mark.parametrize("numel", SIZES)
def test_int8_is_multiplied_by_its_scales(numel: int, block: int, device: torch.device) -> None:
    body, expected = encoded_as_int8(numel, block)
    assert_measured(received(body, numel, device), expected)


@cache
def encoded_as_int8(numel: int, block: int) -> tuple[bytes, list[Tensor]]:
    """Random tensors as a body, and their decoded values; the plain encoder takes seconds for short blocks."""
    items, metadata = int8(random_tensors(numel), block)
    return assemble(items, metadata), list(decoded(items, metadata, dict.fromkeys(NAMES, (numel,))).values())


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("numel", SIZES)
def test_values_are_put_where_their_indices_say(numel: int, share: float, device: torch.device) -> None:
    items, metadata = topk(random_tensors(numel), share, torch.float16, torch.int64)
    said = decoded(items, metadata, dict.fromkeys(NAMES, (numel,)))
    assert_measured(received(assemble(items, metadata), numel, device), list(said.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_norm(value: float, device: torch.device) -> None:
    tensors = random_tensors(CHUNK + 5)
    tensors["fifth"][-1] = value
    for items, metadata in ((tensors, {}), topk({**tensors, "fifth": tensors["fifth"].nan_to_num()}, 1.0)):
        if metadata:
            items["fifth::values"][-1] = value
        assert received(assemble(items, metadata), CHUNK + 5, device)[1] is None
