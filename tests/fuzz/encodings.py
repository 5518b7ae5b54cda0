"""Whatever body is accepted is decoded to what safetensors and a plain decoder make of it."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from torch import Tensor

from encoded import assemble, decoded, int8, topk
from freestep.errors import MalformedTensors
from freestep.wire.encoding import ENCODINGS
from freestep.wire.receiver import Receiver, lay
from freestep_service.optimizers import Quantized
from freestep_service.state.buffers import Vector
from freestep_service.state.decode import decode_and_measure
from fuzz.bodies import MANIFEST, WORDS, framed, pieces, seed
from fuzz.target import Target, mutants
from malformed.bodies import valid

__all__ = ["TARGET"]

_SHAPES = {slot.name: slot.shape for slot in MANIFEST.slots}


def _ours(body: bytes, size: int) -> tuple[Tensor, float | None]:
    """The flat fp32 gradient that a body is decoded to, and its norm. Raises MalformedTensors."""
    vector = Vector(MANIFEST.numel)
    # The vector's earlier content must not show.
    vector.tensor().fill_(math.pi)
    receiver = Receiver(MANIFEST, vector.bytes, len(body), encodings=ENCODINGS)
    for piece in pieces(body, size):
        lay(receiver, piece)
    assert receiver.complete
    whole, norm = decode_and_measure(vector, MANIFEST, receiver)
    if isinstance(whole, Quantized):
        whole = whole.decoded(0, MANIFEST.numel, torch.empty(MANIFEST.numel))
    return whole.float(), norm


def _theirs(body: bytes) -> Tensor:
    """The same by safetensors and a plain decoder."""
    items = safetensors.torch.load(body)
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata = header.get("__metadata__", {})
    if metadata.get("freestep.encoding", "dense") != "dense":
        items = decoded(items, metadata, _SHAPES)
    return torch.cat([items[slot.name].float().reshape(-1) for slot in MANIFEST.slots])


def check(data: bytes) -> None:
    body, size = framed(data)
    try:
        found, norm = _ours(body, size)
    except MalformedTensors:
        return
    expected = _theirs(body)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    length = float(expected.double().norm())
    assert norm == pytest.approx(length, rel=1e-12) if math.isfinite(length) else norm is None


def _seeds() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()}
    mixed = {name: tensors[name].to(dtype) for name, dtype in zip(_SHAPES, (torch.float16, torch.float32,
             torch.bfloat16, torch.float32), strict=True)}  # fmt: skip
    encoded = [
        (mixed, {}),
        int8(tensors),
        int8(tensors, 2),
        topk(tensors, 0.4),
        topk(tensors, 1.0, torch.bfloat16, torch.int64),
        topk(tensors, 0.4, torch.float16),
    ]
    bodies = [valid("F32"), valid("BF16", {"freestep.encoding": "dense"}), *(assemble(*each) for each in encoded)]
    lengths = [len(body) - 8 - int.from_bytes(body[:8], "little") for body in bodies]
    return [seed(body, length, size) for body, length in zip(bodies, lengths, strict=True) for size in (0, 3)]


_SEEDS = _seeds()

TARGET = Target(check, _SEEDS, WORDS, mutants(_SEEDS, WORDS))
