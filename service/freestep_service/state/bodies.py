"""A point as a body: where in a vector its tensors are written, and what goes before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, get_args

import torch
from torch import Tensor

from freestep.api.models import Point, PointDtype
from freestep.wire.encoding import INT8
from freestep.wire.header import data_length, encode_header
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Blocks, Quanta
from freestep_service.state.buffers import Vector
from freestep_service.state.shard import DTYPES

__all__ = ["body", "body_metadata", "copy_point", "room"]


class PointSource(Protocol):
    """A shard, or a copy of its state."""

    manifest: Manifest

    def copy_point(
        self, point: Point, out: Tensor | Quanta, note: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """As `Shard.copy_point`."""


def room(manifest: Manifest) -> int:
    """Bytes of a vector that any point fits into: of tensors of one element int8 is the longest, for their scales."""
    return max(data_length(manifest, dtype) for dtype in get_args(PointDtype))


def copy_point(
    source: PointSource, point: Point, vector: Vector, dtype: str, note: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Writes a point into a vector, of a shard on the thread of its writer; returns (epoch, step).

    note: of a dtype in DTYPES, called again and again with how many bytes are there.
    """
    vector.pin()
    places = _places(vector, source.manifest, dtype)
    if note is None or isinstance(places, Quanta):
        return source.copy_point(point, places)
    return source.copy_point(point, places, lambda count: note(count * places.itemsize))


def _places(vector: Vector, manifest: Manifest, dtype: str) -> Tensor | Quanta:
    """The memory of a vector that a point is written to."""
    if dtype != "I8":
        return vector.tensor(DTYPES[dtype])
    blocks = manifest.derived(Blocks.of, INT8)
    scales = vector.stretch(torch.float32, 0, len(blocks.bounds) - 1)
    return Quanta(vector.stretch(torch.int8, scales.nbytes, manifest.numel), scales, blocks)


def body(
    vector: Vector, manifest: Manifest, dtype: str, run: str, epoch: int, step: int, point: str
) -> tuple[bytes, memoryview]:
    """The body of a point that was written to a vector: its header, and its tensors."""
    header = encode_header(manifest, dtype, body_metadata(run, epoch, step, point))
    return header, vector.bytes[: data_length(manifest, dtype)]


def body_metadata(run: str, epoch: int, step: int, point: str) -> dict[str, str]:
    """The metadata in the header of a body of parameters."""
    return {
        "freestep.run": run,
        "freestep.epoch": str(epoch),
        "freestep.step": str(step),
        "freestep.point": point,
    }
