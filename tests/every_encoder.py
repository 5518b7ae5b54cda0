"""Encoders of every kind over one manifest, and what their bodies say, read the plain way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import safetensors.torch
import torch
from torch import Tensor

import encoded
from freestep import Flat, Int8, Rounded, TopK
from freestep.api.models import ParameterSpec
from freestep.encoders import Encoder
from freestep.wire.encoding import ENCODINGS
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay

__all__ = ["MAKERS", "MANIFEST", "SHAPES", "filled", "read", "said", "whole"]

SHAPES: dict[str, tuple[int, ...]] = {"w": (40, 33), "s": (), "e": (0, 4), "m": (3, 256), "n": (512,), "b": (7,)}
MANIFEST = Manifest([ParameterSpec(name=name, shape=shape) for name, shape in SHAPES.items()])
MAKERS: dict[str, Callable[[Flat], Encoder]] = {
    "bf16": partial(Rounded, dtype="BF16"),
    "f16": partial(Rounded, dtype="F16"),
    "int8": Int8,
    "int8-of-seven": partial(Int8, block=7),
    "int8-of-all": partial(Int8, block=2**31),
    "topk": partial(TopK, fraction=0.05),
    "topk-bf16": partial(TopK, fraction=0.05, dtype="BF16"),
    "topk-f16": partial(TopK, fraction=0.3, dtype="F16"),
    "topk-of-all": partial(TopK, fraction=1.0),
}


def filled(seed: int = 0, manifest: Manifest = MANIFEST) -> Flat:
    flat = Flat(manifest)
    flat.vector.copy_(torch.randn(manifest.numel, generator=torch.Generator().manual_seed(seed)))
    return flat


def whole(encoder: Encoder, count: int = 1) -> list[bytes]:
    return [b"".join(part.body()) for part in encoder.parts(count)]


def read(body: bytes, manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A body's items as the safetensors package reads them, and its metadata as the service does."""
    receiver = Receiver(manifest, memoryview(bytearray(4 * manifest.numel)), len(body), encodings=ENCODINGS)
    lay(receiver, body)
    assert receiver.complete
    return safetensors.torch.load(body), dict(receiver.metadata)


def said(encoder: Encoder, count: int = 1) -> Tensor:
    """What the bodies say, one after the other."""
    vectors = []
    for part in encoder.parts(count):
        items, metadata = read(b"".join(part.body()), part.manifest)
        shapes = {slot.name: slot.shape for slot in part.manifest.slots}
        if not metadata:
            vectors += [items[name].reshape(-1).float() for name in shapes]
            continue
        vectors += [tensor.reshape(-1) for tensor in encoded.decoded(items, metadata, shapes).values()]
    return torch.cat(vectors)
