"""Safetensors files: their content for given tensors, and the header of one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from freestep.errors import MalformedTensors
from freestep.flat import DTYPES, bytes_of
from freestep.wire.header import PREFIX, header_of, parse_header

__all__ = ["DTYPE_NAMES", "content", "read_header"]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The names of torch dtypes in headers."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


def content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[memoryview]:
    """A file's content in pieces, which refer to the memory of tensors that are contiguous and on the host.

    tensors: of F32, BF16 or F16.
    """
    items = [(name, DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    pieces = [bytes_of(tensor.detach().cpu().contiguous()) for tensor in tensors.values()]
    return [memoryview(header_of(items, metadata)), *pieces]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """A file's entries by name (`dtype`, `shape`, `data_offsets`), its metadata, and where its tensors' bytes begin.

    Raises OSError, and MalformedTensors if it is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        if length > _LONGEST_HEADER:
            raise MalformedTensors("the header is too long")
        header, metadata = parse_header(file.read(length))
    return header, metadata, PREFIX + length
