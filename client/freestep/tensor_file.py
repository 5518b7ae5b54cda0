"""Safetensors files: their content for given tensors, and what one that is there contains."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from freestep.errors import MalformedTensors
from freestep.flat import DTYPES, bytes_of
from freestep.wire.header import PREFIX, parse_header

__all__ = ["StoredTensor", "content", "read_tensors", "stored"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is in a file: the name of its dtype, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def itemsize(self) -> int:
        """Bytes per element; 0 if it has none."""
        return len(self.data) // max(prod(self.shape), 1)


def stored(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors of F32, BF16 or F16 as they are in a file; their bytes are not copied if they are contiguous and on the
    host."""
    return {
        name: StoredTensor(_NAMES[tensor.dtype], tuple(tensor.shape), bytes_of(tensor.detach().cpu().contiguous()))
        for name, tensor in tensors.items()
    }


def content(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """A file's content in pieces: its header, and the tensors' bytes, wide dtypes first so that all are aligned."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in ordered:
        end = begin + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [memoryview(len(text).to_bytes(PREFIX, "little") + text), *(tensor.data for _, tensor in ordered)]


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors in a file, whose bytes are read when they are used, and its metadata.

    Raises OSError, and MalformedTensors if it is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        if length > _LONGEST_HEADER:
            raise MalformedTensors("the header is too long")
        header, metadata = parse_header(file.read(length))
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[PREFIX + length :]
    try:
        return {name: _entry(entry, data) for name, entry in header.items()}, metadata
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedTensors(f"an entry of the header is not right: {error}") from None


def _entry(entry: Mapping[str, Any], data: memoryview) -> StoredTensor:
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError("its data_offsets are outside the file")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("its shape is not a list of sizes")
    return StoredTensor(entry["dtype"], tuple(shape), data[begin:end])
