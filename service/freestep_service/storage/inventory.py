"""Which checkpoints of a run there are in storage, and which of their parts pass their checks.

runs/RUN/checkpoints/EPOCH-STEP-SEQ/         one checkpoint:
    BEGIN-END.safetensors, BEGIN-END.json        a part (parts.py)
    complete.json                                all parts are written, on this medium or on those of other hosts; and
                                                 a copy of run.json (older versions wrote none)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from freestep_service.domain.records import CheckpointId
from freestep_service.storage.checksummed import Damaged, read_document, write_document
from freestep_service.storage.coverage import cover
from freestep_service.storage.medium import Storage
from freestep_service.storage.part_manifest import Part, PartManifest, read_manifest
from freestep_service.storage.parts import DamagedPart

__all__ = ["Contents", "Inventory"]

logger = logging.getLogger("freestep")

_MARK = "complete.json"
_CHECKPOINT_NAME = re.compile("([0-9]+)-([0-9]+)-([0-9]+)")
_MANIFEST_NAME = re.compile(r"(([0-9]+)-([0-9]+))\.json")


@dataclass(frozen=True)
class Contents:
    """The parts of a checkpoint that pass the checks made so far; is_damaged: others are known to fail them."""

    parts: list[Part]
    is_marked: bool
    is_damaged: bool

    @property
    def is_complete(self) -> bool:
        """Whether all parts were written and none is known to be damaged, or those that are here cover the run."""
        if not self.parts:
            return False
        return (self.is_marked and not self.is_damaged) or bool(cover(self.parts, 0, self.parts[0].manifest.numel))


class Inventory:
    """The checkpoints of one run as files. Methods raise StorageUnavailable."""

    def __init__(self, storage: Storage, directory: str, first_epoch: int = 0) -> None:
        """directory: runs/RUN/checkpoints. first_epoch: the run's; those of earlier epochs are of a deleted run."""
        self._storage = storage
        self._directory = directory
        self._first_epoch = first_epoch
        self._damaged: dict[CheckpointId, dict[str, PartManifest]] = {}
        """Parts whose tensors were found to be damaged, by name, with the manifest that they had."""

    def path(self, checkpoint_id: CheckpointId) -> str:
        """A checkpoint's directory."""
        return f"{self._directory}/{_name(checkpoint_id)}"

    def ids(self) -> list[CheckpointId]:
        """The run's checkpoints of which there is any file, oldest first."""
        return [checkpoint_id for checkpoint_id in self.all_ids() if checkpoint_id.epoch >= self._first_epoch]

    def all_ids(self) -> list[CheckpointId]:
        """As `ids`, with those that the deletion of an earlier run of this name has left."""
        matches = map(_CHECKPOINT_NAME.fullmatch, self._storage.names(self._directory))
        found = ((match.string, CheckpointId(*map(int, match.groups()))) for match in matches if match)
        return sorted(checkpoint_id for name, checkpoint_id in found if name == _name(checkpoint_id))

    def marks(self) -> list[str]:
        """Where the marks of all checkpoints are, or would be."""
        return [f"{self.path(checkpoint_id)}/{_MARK}" for checkpoint_id in self.all_ids()]

    def contents(self, checkpoint_id: CheckpointId, begin: int = 0, end: int = 0) -> Contents:
        """Reads the manifests of the parts that overlap elements `begin` to `end`, or of all where that is no element.

        Damaged ones are logged.
        """
        path = self.path(checkpoint_id)
        names = self._storage.names(path)
        parts: list[Part] = []
        is_damaged = False
        for match in filter(None, map(_MANIFEST_NAME.fullmatch, names)):
            name, first, last = match[1], int(match[2]), int(match[3])
            if begin < end and not (first < end and begin < last):
                continue
            try:
                part = read_manifest(self._storage, path, checkpoint_id, name)
            except FileNotFoundError:
                # Another process is dropping the checkpoint.
                continue
            except Damaged as error:
                self._log_damage(f"{path}/{name}", error)
                is_damaged = True
                continue
            if self._damaged.get(checkpoint_id, {}).get(name) == part.manifest:
                is_damaged = True
            else:
                parts.append(part)
        return Contents(parts, _MARK in names, is_damaged)

    def is_complete(self, checkpoint_id: CheckpointId) -> bool:
        """As `Contents.is_complete`, without reading the parts of one that is marked."""
        is_marked = _MARK in self._storage.names(self.path(checkpoint_id))
        return (is_marked and not self._damaged.get(checkpoint_id)) or self.contents(checkpoint_id).is_complete

    def mark_complete(self, checkpoint_id: CheckpointId, run_file: Mapping[str, Any] | None = None) -> None:
        """Records that all parts are written, with a copy of the run's file."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        copy = {} if run_file is None else {"run": dict(run_file)}
        write_document(self._storage, f"{self.path(checkpoint_id)}/{_MARK}", {"completed_at": now, **copy})

    def run_files(self) -> Iterator[tuple[CheckpointId, Any]]:
        """The copies of the run's file in the marks of checkpoints, as members, those of the newest first."""
        for checkpoint_id in reversed(self.ids()):
            with suppress(FileNotFoundError, Damaged):
                mark = read_document(self._storage, f"{self.path(checkpoint_id)}/{_MARK}")
                if "run" in mark:
                    yield checkpoint_id, mark["run"]

    def note_damaged(self, checkpoint_id: CheckpointId, error: DamagedPart) -> None:
        """Has a part left out of `contents` until it is written anew, unless its checkpoint is being dropped."""
        if f"{error.part.name}.json" not in self._storage.names(self.path(checkpoint_id)):
            return
        self._log_damage(error.part.path, error)
        self._damaged.setdefault(checkpoint_id, {})[error.part.name] = error.part.manifest

    def note_written(self, checkpoint_id: CheckpointId, name: str) -> None:
        """Forgets that a part was damaged."""
        self._damaged.get(checkpoint_id, {}).pop(name, None)

    def drop(self, checkpoint_id: CheckpointId) -> None:
        """Removes a checkpoint: the mark first, then the manifests, so that what is left never looks whole."""
        path = self.path(checkpoint_id)
        documents = [name for name in self._storage.names(path) if name.endswith(".json")]
        for name in sorted(documents, key=lambda name: name != _MARK):
            self._storage.remove(f"{path}/{name}")
        self._storage.remove(path)
        self._damaged.pop(checkpoint_id, None)

    def _log_damage(self, path: str, error: Damaged) -> None:
        logger.error("checkpoint part %s/%s is damaged and skipped: %s", self._storage, path, error)


def _name(checkpoint_id: CheckpointId) -> str:
    return f"{checkpoint_id.epoch:08d}-{checkpoint_id.step:012d}-{checkpoint_id.seq:012d}"
