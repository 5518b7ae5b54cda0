"""A run's tensors in one flat vector, whose memory bodies are sent from and received into."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from freestep.api.models import PointDtype
from freestep.errors import DtypeOverflow, FreestepError, ManifestMismatch
from freestep.host_copies import copy_on_host
from freestep.wire.encoding import SCALE
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest, Slot
from freestep.wire.receiver import Receiver

__all__ = ["DTYPES", "Flat", "FlatPart", "bytes_of", "is_beyond_f16", "require_f16_holds"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The torch dtypes of the tensor dtypes in bodies."""


_CHUNK = 128 * 1024
"""Elements that are decoded from int8, or looked at, at a time, few enough to stay in the cache."""
_F16_MAGNITUDE, _F16_INFINITY = 0x7FFF, 0x7C00
"""The bits of an F16 but for its sign, and of infinity."""


class FlatPart:
    """A shard's part of a flat vector, or all of it, as bytes.

    manifest: the tensors in it. dtype: that of its memory, F32, BF16 or F16. memory: its bytes, writable. arrives: the
    dtype in which bodies are received, `dtype` or, if that is F32, I8.
    """

    def __init__(self, manifest: Manifest, dtype: str, memory: memoryview, arrives: str) -> None:
        self.manifest = manifest
        self.dtype = dtype
        self.bytes = memory
        self.arrives = arrives

    @cached_property
    def _header(self) -> memoryview:
        return memoryview(encode_header(self.manifest, self.dtype))

    def body(self) -> list[memoryview]:
        """The safetensors body in two pieces without a copy: its header, and the vector's bytes."""
        return [self._header, self.bytes]

    def receiver(self, length: int) -> Receiver:
        """A receiver that puts a body into the vector's memory; `decode` finishes it.

        Args:
            length: The body's length in bytes.
        """
        encoding = "int8" if self.arrives == "I8" else "dense"
        return Receiver(self.manifest, self.bytes, length, DTYPES[self.dtype].itemsize, (encoding,))

    def decode(self, receiver: Receiver) -> None:
        """Decodes int8 to fp32 in place: an element is q · scale. Of F16, sees that no value was too large for it.

        Args:
            receiver: The receiver of this vector, after it has received the whole body.

        Raises:
            DtypeOverflow: A value of the run is beyond 65504, the largest of F16.
        """
        if self.arrives == "F16":
            self._require_no_overflow()
        if self.arrives != "I8":
            return
        for slot in self.manifest.slots:
            if slot.numel:
                self._dequantize(slot, receiver)

    def _require_no_overflow(self) -> None:
        """A run's values are finite: an infinity is one that F16 cannot hold."""
        for slot in self.manifest.slots:
            if not slot.numel:
                continue
            received = torch.frombuffer(self.bytes, dtype=torch.float16, count=slot.numel, offset=2 * slot.offset)
            if is_beyond_f16(received):
                raise DtypeOverflow(
                    f"the parameter {slot.name!r} has a value beyond 65504, which F16 cannot hold: use BF16 or F32"
                )

    def _dequantize(self, slot: Slot, receiver: Receiver) -> None:
        decoded = torch.frombuffer(self.bytes, dtype=torch.float32, count=slot.numel, offset=4 * slot.offset)
        quanta = decoded.view(torch.int8)[3 * slot.numel :]
        scales = torch.frombuffer(receiver.beside[slot.name + SCALE].memory, dtype=torch.float32).view(-1, 1)
        first = 0
        for begin, end, width in receiver.encoding.stretches((slot,), _CHUNK):
            here = slice(begin - slot.offset, end - slot.offset)
            # Copied, since the quanta are right-aligned in the memory that is written: what is written from the front
            # overlaps these quanta, but none that are yet to be read.
            exact = quanta[here].float().view(-1, width)
            torch.mul(exact, scales[first : first + len(exact)], out=decoded[here].view(-1, width))
            first += len(exact)


class Flat(FlatPart):
    """A run's tensors in one flat vector in host memory.

    Attributes: `vector`, [manifest.numel], zeros at first; `views`, a view of each tensor by name; `manifest`; `dtype`,
    that of the vector; `arrives`, the dtype in which bodies are received; `bytes`, the vector's memory. Not safe to use
    from several threads at the same time.

    Example:
        >>> gradient, y = freestep.Flat(run.manifest), freestep.Flat(run.manifest)
        >>> gradient.fill({name: parameter.grad for name, parameter in model.named_parameters()})
        >>> receipt, pulled = run.exchange(gradient, lease.claim(step), into=y)

    Args:
        manifest: The tensors, from `Run.manifest`.
        dtype: "F32", "BF16" or "F16", the vector's dtype; or "I8": the vector is fp32 and bodies are received as int8
            with a scale for each 256 elements, a quarter of the bytes.
        pinned: Allocates page-locked memory, for copies from and to a CUDA device.

    Raises:
        FreestepError: The dtype is another.
    """

    def __init__(self, manifest: Manifest, dtype: str = "F32", *, pinned: bool = False) -> None:
        if dtype not in get_args(PointDtype):
            raise FreestepError(f"dtype must be one of {', '.join(get_args(PointDtype))}, not {dtype!r}")
        stored = "F32" if dtype == "I8" else dtype
        self.vector = torch.zeros(manifest.numel, dtype=DTYPES[stored], device="cpu", pin_memory=pinned)
        super().__init__(manifest, stored, bytes_of(self.vector), dtype)
        self.views: dict[str, Tensor] = {
            slot.name: self.vector[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in manifest.slots
        }
        self._parts: tuple[FlatPart, ...] = ()

    def parts(self, count: int) -> tuple[FlatPart, ...]:
        """The parts of the vector that belong to each shard; for one shard, the vector itself.

        Args:
            count: The run's number of shards.
        """
        if count == 1:
            # Not kept: a vector that refers to itself would keep its memory until garbage is collected.
            return (self,)
        if len(self._parts) != count:
            self._parts = tuple(self._part(index, count) for index in range(count))
        return self._parts

    def _part(self, index: int, count: int) -> FlatPart:
        manifest, size = self.manifest.part(index, count), DTYPES[self.dtype].itemsize
        return FlatPart(manifest, self.dtype, self.bytes[manifest.begin * size : manifest.end * size], self.arrives)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies all tensors into the vector, rounded to its dtype.

        Args:
            tensors: One tensor for each of the manifest, of its shape, on any device.

        Raises:
            ManifestMismatch: Names or shapes are not the manifest's; the vector is unchanged.
            DtypeOverflow: A finite value is beyond 65504, and the vector's dtype is F16.
        """
        for name in tensors:
            if name not in self.views:
                raise ManifestMismatch(f"the run has no tensor {name!r}")
        for name, view in self.views.items():
            if name not in tensors:
                raise ManifestMismatch(f"the tensor {name!r} is missing")
            if tensors[name].shape != view.shape:
                raise ManifestMismatch(
                    f"the tensor {name!r} has shape {list(tensors[name].shape)}, but the run's has {list(view.shape)}"
                )
        self.gather(tensors)

    @torch.no_grad()
    def gather(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copies some tensors into the vector, without checking them; those that are not given stay as they are.

        Args:
            tensors: Tensors of the manifest's names and shapes, dense or sparse, on any device; None for zeros.

        Raises:
            DtypeOverflow: As for `fill`.
        """
        targets, sources = [], []
        for name, tensor in tensors.items():
            view = self.views[name]
            if tensor is None:
                view.zero_()
            else:
                targets.append(view)
                sources.append(tensor.to_dense() if tensor.is_sparse else tensor)
        _copy(targets, sources, sources)
        if self.dtype == "F16":
            for name, tensor in tensors.items():
                if tensor is not None:
                    require_f16_holds(name, tensor, self.views[name])

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the vector into tensors, without checking them.

        Args:
            tensors: One tensor for each of the manifest, of its shape, on any device and of any float dtype.

        Raises:
            DtypeOverflow: A tensor is F16, and a value is beyond 65504; no tensor was changed.
        """
        for name, view in self.views.items():
            if tensors[name].dtype == torch.float16 != view.dtype and view.numel():
                largest = float(view.abs().max())
                if largest > torch.finfo(torch.float16).max:
                    raise DtypeOverflow(
                        f"{name!r} is F16 in the model, and has a value of magnitude {largest:.6g} in the run: use a "
                        "model of bfloat16 or float32"
                    )
        targets = [tensors[name] for name in self.views]
        _copy(targets, list(self.views.values()), targets)


def require_f16_holds(name: str, exact: Tensor, rounded: Tensor) -> None:
    """Raises DtypeOverflow if a finite value of a tensor was rounded to an infinity of F16.

    exact: the tensor, of any float dtype, on any device. rounded: the same as F16, contiguous, in host memory.
    """
    if not is_beyond_f16(rounded):
        return
    exact = exact.to_dense() if exact.is_sparse else exact
    beyond = exact[exact.isfinite() & rounded.view(exact.shape).isinf().to(exact.device)]
    if len(beyond):
        largest = float(beyond[beyond.abs().argmax()])
        raise DtypeOverflow(f"{name!r} has the value {largest:.6g}, which F16 cannot hold: push it as BF16 or F32")


def is_beyond_f16(tensor: Tensor) -> bool:
    """Whether an F16 tensor has an infinity or NaN."""
    chunks = torch.split(tensor.view(-1).view(torch.int16), _CHUNK)
    return any(len(each) > 0 and int((each & _F16_MAGNITUDE).max()) >= _F16_INFINITY for each in chunks)


def _copy(targets: list[Tensor], sources: list[Tensor], outside: list[Tensor]) -> None:
    """Copies each source to its target and waits for it; `outside` are those that may be on other devices."""
    if all(each.device.type == "cpu" for each in outside):
        copy_on_host(targets, sources)
        return
    devices = {each.device for each in outside if each.is_cuda}
    torch._foreach_copy_(targets, sources, non_blocking=bool(devices))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory as bytes, which keep the tensor alive."""
    if not tensor.nbytes:
        # An empty tensor may have a null pointer.
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
