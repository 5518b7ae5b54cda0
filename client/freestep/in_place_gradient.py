"""A gradient for a push whose large tensors are sent from the memory they are in, without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freestep.flat import Flat, FlatPart, bytes_of

__all__ = ["InPlaceGradient", "InPlacePart"]

_LARGE = 128 * 1024
"""Elements from which a tensor is sent in place: below, copying it costs less than a piece of its own to send."""
_ITEMSIZE = 4


class InPlacePart:
    """A shard's part of an InPlaceGradient, with the tensors of its last `gather`."""

    def __init__(self, part: FlatPart, in_place: Mapping[str, memoryview]) -> None:
        self._part = part
        self._in_place = in_place

    def body(self) -> list[memoryview]:
        """The safetensors body in pieces."""
        header, copied = self._part.body()
        pieces, sent = [header], 0
        for slot in self._part.manifest.slots:
            if (tensor := self._in_place.get(slot.name)) is not None:
                begin = _ITEMSIZE * slot.offset
                if sent < begin:
                    pieces.append(copied[sent:begin])
                sent = begin + _ITEMSIZE * slot.numel
                pieces.append(tensor[_ITEMSIZE * slot.start : _ITEMSIZE * (slot.start + slot.numel)])
        if sent < len(copied):
            pieces.append(copied[sent:])
        return pieces


class InPlaceGradient:
    """fp32 tensors for a push; large contiguous ones in host memory are not copied.

    flat: the vector that the other tensors are copied to.

    Tensors that are not copied must not change until the push has been answered.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self._in_place: dict[str, memoryview] = {}

    def gather(self, tensors: Mapping[str, Tensor | None], *, copy: bool = False) -> None:
        """Takes tensors of the manifest's names and shapes, None for zeros; with `copy`, all of them are copied."""
        self._in_place = {
            name: bytes_of(tensor)
            for name, tensor in tensors.items()
            if tensor is not None and not copy and _can_stay(tensor)
        }
        self.flat.gather({name: tensor for name, tensor in tensors.items() if name not in self._in_place})

    def parts(self, count: int) -> Sequence[InPlacePart]:
        """The parts of a run of `count` shards."""
        return [InPlacePart(part, self._in_place) for part in self.flat.parts(count)]


def _can_stay(tensor: Tensor) -> bool:
    return (
        tensor.numel() >= _LARGE
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
    )
