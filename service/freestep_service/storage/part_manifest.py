"""The manifest of a checkpoint's part: all of a run's state that is no vector, and what is in the file of the vectors.

A manifest is believed only if it passes its own checks and is that of the part whose name it bears. Each part's has the
scalars of the whole state, so that any part gives what all parts of a checkpoint have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from freestep.api.models import ParameterSpec
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest
from freestep_service.domain.control import Control
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.norm_history import NormHistory
from freestep_service.domain.records import CheckpointId, Record
from freestep_service.domain.tally import NOTHING_COUNTED, Tally
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checksummed import Damaged, read_document
from freestep_service.storage.medium import Storage

__all__ = ["Part", "PartManifest", "manifest_members", "part_layout", "part_name", "read_manifest"]


class PartManifest(BaseModel):
    """The members of a manifest, beside its format and checksum. Those with a default are missing in older files."""

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: int
    step: int
    seq: int
    begin: int
    end: int
    numel: int
    """Elements of the whole run."""
    vectors: list[str]
    """Names of the state vectors, in the order of the tensors' file."""
    tensors: str
    """Checksum of the whole tensors' file."""
    created_at: str
    bytes: int
    """Length of the tensors' file."""
    scalars: dict[str, dict[str, int | float]]
    group: dict[str, int]
    weight: float
    damping: float
    lateness: int = 0
    loss: float = 0.0
    expected_staleness: float = 0.0
    metrics: dict[str, dict[str, float]] = {}
    """Metric -> step -> value, as evaluators have reported them."""
    norms: list[list[str | float | bool]] = []
    """[worker, norm, whether it was an outlier] of the newest pushes, oldest first, under a robust rule."""
    outliers: dict[str, int] = {}
    banned: dict[str, int] = {}
    """Worker -> number, likewise."""
    data: dict[str, dict[str, Any]] = {}
    """Name -> how much of a data set has counted, as a DataState."""
    gathered_units: list[list[str | int]] = []
    """Name and number of the units in the unfinished update."""
    control: dict[str, Any] = {}
    """What is changed of the run, as of domain/control.py."""
    receipts: dict[str, dict[str, Any]]
    tally: dict[str, int | float | None] = {}
    """What had been counted of the run's pushes, as the part's writer knew it."""

    def state_copy(self, tensors: dict[str, Tensor]) -> StateCopy:
        """The state with these vectors, which may be of any stretch of the run."""
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
            tally=Tally(**self.tally),  # type: ignore[arg-type]
            norm_history=NormHistory.of(self.norms, self.outliers, self.banned),
            data=DataSets.of(self.data, self.gathered_units),
            control=Control.of_member(self.control),
        )


@dataclass(frozen=True)
class Part:
    """A part whose manifest passed its checks; its tensors have not been read.

    path: of its files, without the suffix. layout, header: those of the tensors' file.
    """

    name: str
    path: str
    manifest: PartManifest
    layout: Manifest
    header: bytes
    receipts: dict[str, Record]

    def common_state(self) -> str:
        """What all parts of a checkpoint have in common, as text, in which NaN is equal to itself."""
        own = {"begin", "end", "tensors", "created_at", "bytes", "receipts", "tally"}
        return json.dumps(self.manifest.model_dump(exclude=own), sort_keys=True)


def part_name(begin: int, end: int) -> str:
    """The name of a part's files, without the suffix."""
    return f"{begin:015d}-{end:015d}"


def manifest_members(
    copy: StateCopy, begin: int, end: int, numel: int, receipts: Mapping[str, Record], size: int, tensors: str
) -> dict[str, Any]:
    """The members of a PartManifest, made now. size, tensors: length and checksum of the tensors' file."""
    return {
        "epoch": copy.epoch,
        "step": copy.step,
        "seq": copy.seq,
        "begin": begin,
        "end": end,
        "numel": numel,
        "vectors": list(copy.tensors),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": size,
        "scalars": {group: dict(scalars) for group, scalars in copy.scalars.items()},
        "group": copy.group,
        "weight": copy.weight,
        "damping": copy.damping,
        "lateness": copy.lateness,
        "loss": copy.loss,
        "metrics": {name: {str(step): value for step, value in steps.items()} for name, steps in copy.reported.items()},
        "expected_staleness": copy.expected_staleness,
        **copy.norm_history.members(),
        **copy.data.manifest_members(),
        **copy.control.members(),
        "receipts": {key: _kept(record) for key, record in receipts.items()},
        "tensors": tensors,
        **({"tally": copy.tally._asdict()} if copy.tally != NOTHING_COUNTED else {}),
    }


def _kept(record: Record) -> dict[str, Any]:
    """The members of a record, without the bound that its push was clipped to: it has had its effect."""
    return {name: value for name, value in asdict(record).items() if name != "bound"}


def read_manifest(storage: Storage, directory: str, checkpoint_id: CheckpointId, name: str) -> Part:
    """The part of this name of a checkpoint, whose files are in `directory`. Its tensors are not read.

    Raises FileNotFoundError, StorageUnavailable, and Damaged where the manifest fails its checks.
    """
    path = f"{directory}/{name}"
    try:
        manifest = PartManifest.model_validate(read_document(storage, f"{path}.json"))
        layout = part_layout(manifest.vectors, manifest.end - manifest.begin)
        receipts = {key: Record(**record) for key, record in manifest.receipts.items()}
    except (ValidationError, TypeError) as error:
        raise Damaged("its manifest lacks members, or has others") from error
    header = encode_header(layout, "F32")
    named = (CheckpointId(manifest.epoch, manifest.step, manifest.seq), part_name(manifest.begin, manifest.end))
    if named != (checkpoint_id, name) or manifest.end > manifest.numel:
        raise Damaged("its manifest is that of another part")
    if manifest.bytes != len(header) + 4 * layout.numel or len(layout.by_name) != len(layout.slots):
        raise Damaged("its manifest contradicts itself")
    return Part(name, path, manifest, layout, header, receipts)


def part_layout(vectors: Iterable[str], length: int) -> Manifest:
    """Where the vectors lie in a part's file. Raises ValidationError."""
    return Manifest(ParameterSpec(name=name, shape=(length,)) for name in vectors)
