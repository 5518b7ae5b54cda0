"""A manifest's tensors in one flat vector, as bytes to send from and to receive into."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from freestep.errors import ManifestMismatch
from freestep.header import encode_header
from freestep.manifest import Manifest
from freestep.wire import Receiver

__all__ = ["DTYPES", "Flat", "Stretch", "bytes_of"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's names of the dtypes that travel."""


class Stretch:
    """Bytes that hold a manifest's tensors, all of one dtype in DTYPES: a flat vector, or a shard's part of one."""

    def __init__(self, manifest: Manifest, dtype: str, memory: memoryview) -> None:
        self.manifest = manifest
        self.dtype = dtype
        self.bytes = memory

    @cached_property
    def _header(self) -> memoryview:
        return memoryview(encode_header(self.manifest, self.dtype))

    def body(self, metadata: Mapping[str, str] | None = None) -> list[memoryview]:
        """The safetensors body in pieces; the second is the stretch itself."""
        header = memoryview(encode_header(self.manifest, self.dtype, metadata)) if metadata else self._header
        return [header, self.bytes]

    def receiver(self, length: int) -> Receiver:
        """Lays a body of `length` bytes into the stretch."""
        return Receiver(self.manifest, self.bytes, length, DTYPES[self.dtype].itemsize)


class Flat(Stretch):
    """A flat vector on the host, [manifest.numel] of a dtype in DTYPES, and a view of each tensor in it.

    pinned: in memory that a CUDA device can reach by itself, for tensors that come from there or go there.
    """

    def __init__(self, manifest: Manifest, dtype: str = "F32", *, pinned: bool = False) -> None:
        self.vector = torch.zeros(manifest.numel, dtype=DTYPES[dtype], pin_memory=pinned)
        super().__init__(manifest, dtype, bytes_of(self.vector))
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
        return Stretch(manifest, self.dtype, self.bytes[manifest.begin * size : manifest.end * size])

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
        """Copies tensors in that are known to fit; zeros where there is None."""
        targets, sources = [], []
        for name, view in self.views.items():
            tensor = tensors[name]
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
