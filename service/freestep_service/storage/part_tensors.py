"""The tensors of a checkpoint's part: a safetensors file of flat fp32 vectors, written and read in pieces.

The law of this file: all bytes of a file pass through its checksum (XXH3-128), also those that nobody asked for, and
none of them is to be used before that has been compared with what the part's manifest names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from freestep_service.storage.media import Storage
from freestep_service.storage.part_manifest import DamagedPart, Part

__all__ = ["read_tensors", "write_tensors"]

_PIECE = 4 * 1024 * 1024
"""Bytes that pass through memory at a time."""


def write_tensors(storage: Storage, path: str, header: bytes, tensors: Iterable[Tensor]) -> str:
    """Writes the tensors behind their header, and returns the checksum of the whole file. path: without a suffix."""
    digest = xxhash.xxh3_128()
    storage.write(f"{path}.safetensors", _digested(_pieces(header, tensors), digest))
    return digest.hexdigest()


def read_tensors(storage: Storage, part: Part, first: int, last: int, targets: Mapping[str, Tensor]) -> None:
    """Reads a part's tensors once through, and of each elements `first` to `last` of the run into its target.

    Raises DamagedPart when they do not have the checksum that the manifest names.
    """
    digest = xxhash.xxh3_128()
    scratch = memoryview(bytearray(_PIECE))
    skipped, length = first - part.manifest.begin, last - first
    try:
        with storage.open(f"{part.path}.safetensors") as file:

            def pass_on(size: int, target: memoryview | None = None) -> None:
                for start in range(0, size, _PIECE):
                    piece = (scratch if target is None else target[start:])[: min(_PIECE, size - start)]
                    if file.readinto(piece) != len(piece):
                        raise DamagedPart(part, "its tensors are cut short")
                    digest.update(piece)

            if file.read(len(part.header)) != part.header:
                raise DamagedPart(part, "its tensors do not begin with the header that belongs to its manifest")
            digest.update(part.header)
            for slot in part.layout.slots:
                target = targets.get(slot.name)
                if target is None:
                    pass_on(4 * slot.numel)
                else:
                    pass_on(4 * skipped)
                    pass_on(4 * length, _bytes_of(target))
                    pass_on(4 * (slot.numel - skipped - length))
            is_at_end = not file.read(1)
    except OSError as error:
        raise DamagedPart(part, f"its tensors cannot be read: {error}") from error
    if not is_at_end or digest.hexdigest() != part.manifest.tensors:
        raise DamagedPart(part, "its tensors do not have the checksum that its manifest names")


def _pieces(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        content = _bytes_of(tensor)
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


def _digested(pieces: Iterable[bytes | memoryview], digest: xxhash.xxh3_128) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a flat fp32 tensor on the CPU."""
    assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "state vectors are flat fp32"
    # An empty array's memory cannot be cast.
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
