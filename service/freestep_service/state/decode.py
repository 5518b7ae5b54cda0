"""Between reception and commit: the tensors of a body become one vector, of which it is known how long it is."""

from __future__ import annotations

from itertools import groupby
from math import isfinite, sqrt

import torch
from torch import Tensor

from freestep.errors import MalformedTensors
from freestep.wire.encoding import INDICES, SCALE, VALUES
from freestep.wire.manifest import Manifest, Slot
from freestep.wire.receiver import Beside, Receiver
from freestep_service.optimizers import Pushed, Quantized, dequantize, square_sum, widen
from freestep_service.optimizers.kernels.streams import arriving, settle
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import HOST
from freestep_service.state.shard import DTYPES

__all__ = ["decode_and_measure"]

_BESIDE = {**DTYPES, "I32": torch.int32, "I64": torch.int64}


def decode_and_measure(vector: Vector, manifest: Manifest, receiver: Receiver) -> tuple[Pushed, float | None]:
    """Makes one flat vector [numel] of all that was received into a vector.

    On the host it is in the vector's own memory: int8, or BF16 or F16 where all tensors came so, else fp32. To a GPU
    they go as they came, and become fp32 there. Returns it, and its 2-norm, or None when that is not finite. Raises
    MalformedTensors where indices are not those of different elements.
    """
    if vector.device == HOST and receiver.dtype is not None:
        whole = _whole(vector, receiver.dtype)
        return whole, _norm(square_sum(whole))
    if vector.device == HOST and receiver.encoding.name == "int8":
        quantized = _quantized(vector, manifest, receiver)
        return quantized, _norm(quantized.square_sum())
    vector.pin()
    with arriving(vector.device):
        total = _decode(vector, manifest, receiver)
        settle(vector.device)
    return vector.wide, _norm(float(total))


def _decode(vector: Vector, manifest: Manifest, receiver: Receiver) -> float | Tensor:
    """Makes fp32 of all tensors, and returns the sum of their squares; before a GPU has done what it was asked.

    A narrow tensor among others lies right-aligned in its slot, whose front it does not reach before it is read.
    """
    memory, wide = vector.tensor(), vector.wide
    if receiver.dtype is not None:
        return widen(_whole(vector, receiver.dtype), wide)
    if receiver.encoding.name == "topk":
        return sum(_scatter(slot, receiver, _place(wide, slot)) for slot in manifest.slots)
    if receiver.encoding.name == "int8":
        came = _quantized(vector, manifest, receiver)
        parts = zip(came.slots, came.quanta, came.scales, strict=True)
        return sum(dequantize(quanta, scales, came.block, _place(wide, slot)) for slot, quanta, scales in parts)
    total: float | Tensor = 0.0
    for dtype, members in groupby(manifest.slots, key=lambda slot: receiver.dtypes[slot.name]):
        run = list(members)
        if dtype == "F32":
            part = slice(run[0].offset, run[-1].offset + run[-1].numel)
            total += square_sum(wide[part]) if vector.device == HOST else widen(memory[part], wide[part])
            continue
        for slot in run:
            total += widen(_place(memory, slot).view(DTYPES[dtype])[slot.numel :], _place(wide, slot))
    return total


def _quantized(vector: Vector, manifest: Manifest, receiver: Receiver) -> Quantized:
    quanta = [_place(vector.tensor(), slot).view(torch.int8)[3 * slot.numel :] for slot in manifest.slots]
    scales = [_tensor(receiver.beside[slot.name + SCALE]) for slot in manifest.slots]
    return Quantized(manifest.slots, quanta, scales, receiver.encoding.block)


def _whole(vector: Vector, dtype: str) -> Tensor:
    """The tensors as they came, all of one dtype: right-aligned in the vector."""
    element = DTYPES[dtype]
    return vector.stretch(element, (4 - element.itemsize) * vector.numel, vector.numel)


def _norm(square_sum: float) -> float | None:
    return sqrt(square_sum) if isfinite(square_sum) else None


def _scatter(slot: Slot, receiver: Receiver, place: Tensor) -> float:
    """Puts the values of a top-k encoding where its indices say, and returns the sum of their squares."""
    values = _tensor(receiver.beside[slot.name + VALUES]).to(torch.float32)
    indices = _tensor(receiver.beside[slot.name + INDICES]).to(torch.int64)
    place.zero_()
    if indices.numel():
        if int(indices.min()) < 0 or int(indices.max()) >= slot.numel:
            raise MalformedTensors(f"the indices of {slot.name!r} are not all from 0 to {slot.numel - 1}")
        if bool((indices.sort().values.diff() == 0).any()):
            raise MalformedTensors(f"an index of {slot.name!r} stands twice")
        place[indices.to(place.device)] = values.to(place.device)
    return square_sum(values)


def _place(wide: Tensor, slot: Slot) -> Tensor:
    return wide[slot.offset : slot.offset + slot.numel]


def _tensor(part: Beside) -> Tensor:
    dtype = _BESIDE[part.dtype]
    return torch.frombuffer(part.memory, dtype=dtype) if part.memory else torch.empty(0, dtype=dtype, device="cpu")
