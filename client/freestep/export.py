"""A point of a run as a file: safetensors, or a state_dict of torch's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freestep.answers import Snapshot
from freestep.files import writing
from freestep.flat import bytes_of
from freestep.tensor_file import content, stored

__all__ = ["write_safetensors", "write_torch"]


def write_safetensors(path: Path, x: Snapshot, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whose metadata say where the tensors are from. Raises OSError.

    metadata: further entries.
    """
    with writing(path) as file:
        for piece in content(stored(x), {**x.metadata(), **(metadata or {})}):
            file.write(piece)


def write_torch(path: Path, x: Snapshot) -> None:
    """Writes a state_dict that `torch.load(path, weights_only=True)` reads. Raises OSError."""
    with writing(path) as file:
        torch.save({name: _alone(tensor) for name, tensor in x.items()}, file)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor of the same memory, which is a storage of its own: with a view, torch saves all of the flat vector."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    return torch.frombuffer(bytes_of(tensor), dtype=tensor.dtype).view(tensor.shape)
