"""Bodies of encoded gradients, made the plain way, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from freestep.wire.header import header_of

__all__ = ["assemble", "decoded", "int8", "topk"]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8",
           torch.int32: "I32", torch.int64: "I64"}  # fmt: skip


def assemble(items: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors body of tensors of any dtype."""
    header = header_of(((name, _DTYPES[each.dtype], each.shape) for name, each in items.items()), metadata)
    data = [each.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for each in items.values() if each.numel()]
    return b"".join([header, *data])


def int8(tensors: Mapping[str, Tensor], block: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The items and the metadata; without `block`, blocks are of 256 elements and the metadata does not say so."""
    items: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        blocks = tensor.reshape(-1).split(block or 256) if tensor.numel() else []
        scales = [_scale(each) for each in blocks]
        quanta = [
            # In a block without a scale nothing but 0 is said.
            (each / scale).round().to(torch.int8) if scale > 0 else torch.zeros(each.shape, dtype=torch.int8)
            for each, scale in zip(blocks, scales, strict=True)
        ]
        items[name] = torch.cat([torch.empty(0, dtype=torch.int8), *quanta]).reshape(tensor.shape)
        items[f"{name}::scale"] = torch.tensor([float(scale) for scale in scales])
    return items, {"freestep.encoding": "int8", **({"freestep.block": str(block)} if block else {})}


def _scale(block: Tensor) -> Tensor:
    """The largest magnitude / 127; but not subnormal, and not so large that 127 of it are infinite."""
    largest = block.abs().max()
    if largest == 0 or not largest.isfinite():
        return largest - largest
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return scale if (127 * scale).isfinite() else torch.nextafter(scale, torch.tensor(0.0))


def topk(
    tensors: Mapping[str, Tensor], share: float, values: Any = torch.float32, indices: Any = torch.int32
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The items and the metadata: the largest values of each tensor, in no order."""
    items: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        largest = flat.abs().topk(min(flat.numel(), 1 + int(share * flat.numel()))).indices
        items[f"{name}::values"] = flat[largest].to(values)
        items[f"{name}::indices"] = largest.to(indices)
    return items, {"freestep.encoding": "topk"}


def decoded(items: Mapping[str, Tensor], metadata: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """What encoded items say, as fp32."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.zeros(shape).reshape(-1)
        if metadata["freestep.encoding"] == "topk":
            tensor[items[f"{name}::indices"].long()] = items[f"{name}::values"].float()
        else:
            block = min(int(metadata.get("freestep.block", "256")), max(tensor.numel(), 1))
            scales = items[f"{name}::scale"].repeat_interleave(block)[: tensor.numel()]
            tensor = items[name].reshape(-1).float() * scales
        tensors[name] = tensor.reshape(shape)
    return tensors
