"""A manifest's tensors in one flat vector, as bytes to send from and to receive into."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from freestep.api.models import PointDtype
from freestep.errors import FreestepError, ManifestMismatch
from freestep.wire.encoding import SCALE
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest, Slot
from freestep.wire.receiver import Receiver

__all__ = ["DTYPES", "Flat", "Stretch", "bytes_of"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's names of the dtypes that travel."""


_CHUNK = 128 * 1024
"""Elements that are made of int8 at a time: few enough to stay in the cache."""


class Stretch:
    """Bytes that hold a manifest's tensors, all of one dtype in DTYPES: a flat vector, or a shard's part of one.

    arrives: what it is received as, its own dtype or, where that is F32, I8.
    """

    def __init__(self, manifest: Manifest, dtype: str, memory: memoryview, arrives: str) -> None:
        self.manifest = manifest
        self.dtype = dtype
        self.bytes = memory
        self.arrives = arrives

    @cached_property
    def _header(self) -> memoryview:
        return memoryview(encode_header(self.manifest, self.dtype))

    def body(self, metadata: Mapping[str, str] | None = None) -> list[memoryview]:
        """The safetensors body in pieces; the second is the stretch itself."""
        header = memoryview(encode_header(self.manifest, self.dtype, metadata)) if metadata else self._header
        return [header, self.bytes]

    def receiver(self, length: int) -> Receiver:
        """Lays a body of `length` bytes into the stretch, where `decode` makes the tensors of it."""
        encoding = "int8" if self.arrives == "I8" else "dense"
        return Receiver(self.manifest, self.bytes, length, DTYPES[self.dtype].itemsize, (encoding,))

    def decode(self, receiver: Receiver) -> None:
        """Makes fp32 of int8 that has arrived, in place: an element is q · scale."""
        if self.arrives != "I8":
            return
        for slot in self.manifest.slots:
            if slot.numel:
                self._dequantize(slot, receiver)

    def _dequantize(self, slot: Slot, receiver: Receiver) -> None:
        place = torch.frombuffer(self.bytes, dtype=torch.float32, count=slot.numel, offset=4 * slot.offset)
        quanta = place.view(torch.int8)[3 * slot.numel :]
        scales = torch.frombuffer(receiver.beside[slot.name + SCALE].memory, dtype=torch.float32).view(-1, 1)
        first = 0
        for begin, end, width in receiver.encoding.stretches((slot,), _CHUNK):
            here = slice(begin - slot.offset, end - slot.offset)
            # A copy, since the place lies over some of them; it never lies over those that are yet to be read.
            exact = quanta[here].float().view(-1, width)
            torch.mul(exact, scales[first : first + len(exact)], out=place[here].view(-1, width))
            first += len(exact)


class Flat(Stretch):
    """A flat vector on the host, [manifest.numel], and a view of each tensor in it.

    dtype: F32, BF16 or F16; or I8, of which the vector is F32 but is received as int8 with scales, a quarter of the
        bytes. Raises FreestepError where it is another.
    pinned: in memory that a CUDA device can reach by itself, for tensors that come from there or go there.
    """

    def __init__(self, manifest: Manifest, dtype: str = "F32", *, pinned: bool = False) -> None:
        if dtype not in get_args(PointDtype):
            raise FreestepError(f"a dtype is one of {', '.join(get_args(PointDtype))}, not {dtype!r}")
        held = "F32" if dtype == "I8" else dtype
        self.vector = torch.zeros(manifest.numel, dtype=DTYPES[held], pin_memory=pinned)
        super().__init__(manifest, held, bytes_of(self.vector), dtype)
        self.views: dict[str, Tensor] = {
            slot.name: self.vector[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in manifest.slots
        }
        self._parts: tuple[Stretch, ...] = (self,)

    def parts(self, count: int) -> tuple[Stretch, ...]:
        """The stretches of the vector that are the shards of a run cut into `count`; of one, the vector itself."""
        if len(self._parts) != count:
            self._parts = (self,) if count == 1 else tuple(self._part(index, count) for index in range(count))
        return self._parts

    def _part(self, index: int, count: int) -> Stretch:
        manifest, size = self.manifest.part(index, count), DTYPES[self.dtype].itemsize
        return Stretch(manifest, self.dtype, self.bytes[manifest.begin * size : manifest.end * size], self.arrives)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors in, rounding them to the vector's dtype.

        Raises ManifestMismatch when their names or shapes are not the manifest's.
        """
        for name in tensors:
            if name not in self.views:
                raise ManifestMismatch(f"the run has no tensor {name!r}")
        for name, view in self.views.items():
            if name not in tensors:
                raise ManifestMismatch(f"the tensor {name!r} is missing")
            if tensors[name].shape != view.shape:
                raise ManifestMismatch(
                    f"the tensor {name!r} has the shape {list(tensors[name].shape)}, and the run's {list(view.shape)}"
                )
        self.gather(tensors)

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copies tensors in that are known to fit; zeros where there is None. Others stay what they are."""
        targets, sources = [], []
        for name, tensor in tensors.items():
            view = self.views[name]
            if tensor is None:
                view.zero_()
            else:
                targets.append(view)
                sources.append(tensor.to_dense() if tensor.is_sparse else tensor)
        _copy(targets, sources, sources)

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the vector into tensors that are known to fit."""
        targets = [tensors[name] for name in self.views]
        _copy(targets, list(self.views.values()), targets)


def _copy(targets: list[Tensor], sources: list[Tensor], elsewhere: list[Tensor]) -> None:
    """Copies each source to its target, all at once, and returns when they are there; `elsewhere` may be on devices."""
    if not targets:
        return
    devices = {each.device for each in elsewhere if each.is_cuda}
    torch._foreach_copy_(targets, sources, non_blocking=bool(devices))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, which keep it alive on their way to and from a socket."""
    if not tensor.nbytes:
        # It may have no address.
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
