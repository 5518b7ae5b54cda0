"""What the manifest of a checkpoint's part says of its cut and of its tensors.

The law of this file: a manifest is believed only when it is whole, is that of the part whose name it bears, and agrees
with itself. It holds all of a cut but the tensors, so that any part gives the state that all parts have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from freestep.api.models import ParameterSpec
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest
from freestep_service.domain.records import CheckpointId, Record
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checksummed import Damaged, verified
from freestep_service.storage.media import Storage

__all__ = ["DamagedPart", "Part", "PartManifest", "layout_of", "manifest_of", "read_part", "stretch_name"]


class PartManifest(BaseModel):
    """What a part's json holds beside its format and checksum; older versions wrote none of what has a default."""

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: int
    step: int
    seq: int
    begin: int
    end: int
    numel: int
    """Elements of the whole run."""
    vectors: list[str]
    """The names of the tensors, in the order of the file; each is flat fp32 [end - begin]."""
    tensors: str
    """The checksum of the whole file of the tensors."""
    created_at: str
    bytes: int
    scalars: dict[str, dict[str, int | float]]
    group: dict[str, int]
    weight: float
    damping: float
    lateness: int = 0
    loss: float = 0.0
    expected_staleness: float = 0.0
    metrics: dict[str, dict[str, float]] = {}
    """Name -> step -> value, of what evaluators have reported."""
    receipts: dict[str, dict[str, Any]]

    def state_copy(self, tensors: dict[str, Tensor]) -> StateCopy:
        """The cut that the manifest tells of, with tensors of any stretch of the run."""
        return StateCopy(
            epoch=self.epoch,
            step=self.step,
            seq=self.seq,
            tensors=tensors,
            scalars=dict(self.scalars),
            group=dict(self.group),
            weight=self.weight,
            damping=self.damping,
            lateness=self.lateness,
            loss=self.loss,
            reported={
                name: {int(step): value for step, value in steps.items()} for name, steps in self.metrics.items()
            },
            expected_staleness=self.expected_staleness,
        )


@dataclass(frozen=True)
class Part:
    """A part whose manifest passed its checks. path: without a suffix; header: what its file begins with."""

    name: str
    path: str
    manifest: PartManifest
    layout: Manifest
    header: bytes
    receipts: dict[str, Record]

    def common(self) -> str:
        """What all parts of a cut have in common, as text, by which NaN is equal to itself."""
        own = {"begin", "end", "tensors", "created_at", "bytes", "receipts"}
        return json.dumps(self.manifest.model_dump(exclude=own), sort_keys=True)


class DamagedPart(Damaged):
    """A part's manifest passed its checks, and the part does not."""

    def __init__(self, part: Part, reason: str) -> None:
        super().__init__(reason)
        self.part = part


def manifest_of(
    cut: StateCopy, begin: int, end: int, numel: int, receipts: Mapping[str, Record], size: int, created_at: str
) -> dict[str, Any]:
    """What a PartManifest is read from, but for the checksum of the tensors, whose file has `size` bytes."""
    return {
        "epoch": cut.epoch,
        "step": cut.step,
        "seq": cut.seq,
        "begin": begin,
        "end": end,
        "numel": numel,
        "vectors": list(cut.tensors),
        "created_at": created_at,
        "bytes": size,
        "scalars": {group: dict(scalars) for group, scalars in cut.scalars.items()},
        "group": cut.group,
        "weight": cut.weight,
        "damping": cut.damping,
        "lateness": cut.lateness,
        "loss": cut.loss,
        "metrics": {name: {str(step): value for step, value in steps.items()} for name, steps in cut.reported.items()},
        "expected_staleness": cut.expected_staleness,
        "receipts": {key: asdict(record) for key, record in receipts.items()},
    }


def read_part(storage: Storage, directory: str, cut: CheckpointId, name: str) -> Part:
    """A part of a cut, whose files are in a directory.

    Raises FileNotFoundError when it is not there, Damaged when its manifest fails its checks.
    """
    path = f"{directory}/{name}"
    try:
        document = verified(storage.read(f"{path}.json"))
        manifest = PartManifest.model_validate(document)
        layout = layout_of(manifest.vectors, manifest.end - manifest.begin)
        receipts = {key: Record(**record) for key, record in manifest.receipts.items()}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"its manifest cannot be read ({error})") from error
    except (ValidationError, TypeError) as error:
        raise Damaged("its manifest does not hold what one holds") from error
    header = encode_header(layout, "F32")
    named = (CheckpointId(manifest.epoch, manifest.step, manifest.seq), stretch_name(manifest.begin, manifest.end))
    if named != (cut, name) or manifest.end > manifest.numel:
        raise Damaged("its manifest is that of another part")
    if manifest.bytes != len(header) + 4 * layout.numel or len(layout.by_name) != len(layout.slots):
        raise Damaged("its manifest contradicts itself")
    return Part(name, path, manifest, layout, header, receipts)


def stretch_name(begin: int, end: int) -> str:
    """How the part of elements `begin` to `end` is named, and what else is of that stretch."""
    return f"{begin:015d}-{end:015d}"


def layout_of(vectors: Iterable[str], length: int) -> Manifest:
    """Where the vectors lie in a part's file, one after another. Raises ValidationError."""
    return Manifest(ParameterSpec(name=name, shape=(length,)) for name in vectors)
