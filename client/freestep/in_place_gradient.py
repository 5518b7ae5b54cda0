"""A manifest's tensors on their way to the service, the large ones from where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freestep.flat import Flat, Stretch, bytes_of

__all__ = ["Loose", "Piecewise"]

_LARGE = 128 * 1024
"""Elements from which a tensor is sent by itself: a piece has a cost of its own, which is more than a copy of few."""
_ITEMSIZE = 4


class Piecewise:
    """A shard's part of a Loose, whose tensors are as they were when they were gathered."""

    def __init__(self, stretch: Stretch, apart: Mapping[str, memoryview]) -> None:
        self._stretch = stretch
        self._apart = apart

    def body(self) -> list[memoryview]:
        """The safetensors body in pieces."""
        header, gathered = self._stretch.body()
        pieces, sent = [header], 0
        for slot in self._stretch.manifest.slots:
            if (tensor := self._apart.get(slot.name)) is not None:
                begin = _ITEMSIZE * slot.offset
                if sent < begin:
                    pieces.append(gathered[sent:begin])
                sent = begin + _ITEMSIZE * slot.numel
                pieces.append(tensor[_ITEMSIZE * slot.start : _ITEMSIZE * (slot.start + slot.numel)])
        if sent < len(gathered):
            pieces.append(gathered[sent:])
        return pieces


class Loose:
    """fp32 tensors for a push, of which only those are copied that are small, or not in order in the host's memory.

    flat: where they are copied to.

    The others must not be changed until the push has been answered.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self._apart: dict[str, memoryview] = {}

    def gather(self, tensors: Mapping[str, Tensor | None], *, copy: bool = False) -> None:
        """Takes tensors that are known to fit; zeros where there is None. copy: of all of them."""
        self._apart = {
            name: bytes_of(tensor)
            for name, tensor in tensors.items()
            if tensor is not None and not copy and _can_stay(tensor)
        }
        self.flat.gather({name: tensor for name, tensor in tensors.items() if name not in self._apart})

    def parts(self, count: int) -> Sequence[Piecewise]:
        """The parts of a run cut into `count` shards."""
        return [Piecewise(stretch, self._apart) for stretch in self.flat.parts(count)]


def _can_stay(tensor: Tensor) -> bool:
    return (
        tensor.numel() >= _LARGE
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
    )
