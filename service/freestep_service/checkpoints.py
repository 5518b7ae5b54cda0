"""Checkpoints on disk: a shard's cut and the receipts of the pushes in it.

    DATA_DIR/deleted/RUN                                the last epoch of a run that was deleted
    DATA_DIR/runs/RUN/run.json                          spec, epoch, and how the service last left the run
    DATA_DIR/runs/RUN/checkpoints/EPOCH-STEP-SEQ/       state.safetensors, manifest.json

The law of this file: a checkpoint is whole or it is not there. Files are written under a hidden name, flushed to
disk and renamed, and hidden again before they are dropped; the manifest names the checksum of the tensors and of
itself; what fails a check is skipped and said so. Checksums are XXH3-128, against damage and not against forgery.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from freestep.errors import CheckpointNotFound
from freestep.models import Checkpoint
from freestep_service.records import Record
from freestep_service.shard import Cut

__all__ = ["Checkpoints", "LastEpochs", "RunFile"]

logger = logging.getLogger("freestep")

_FORMAT = 1


class Damaged(Exception):
    """A checkpoint that fails its checks; the message says how."""


@dataclass(frozen=True)
class RunFile:
    """What the data directory knows of a run beside its checkpoints.

    closed_seq is the log entry that the last checkpoint of a clean shutdown stood at, None after anything else.
    """

    spec: str
    epoch: int
    closed_seq: int | None = None

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _write_whole(directory / "run.json", json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, directory: Path) -> RunFile:
        """Raises OSError or ValueError when there is none that can be read."""
        return cls(**json.loads((directory / "run.json").read_bytes()))


class LastEpochs:
    """The last epoch of each run that was deleted, in DATA_DIR/deleted: a run of the same name goes on after it.

    Else a lease, a step or an ETag of the run that is gone would pass for one of the new run's.
    """

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "deleted"

    def read(self, run: str) -> int:
        """0 for a run that never was."""
        try:
            return int((self._directory / run).read_text())
        except FileNotFoundError:
            return 0

    def write(self, run: str, epoch: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        _write_whole(self._directory / run, str(epoch).encode())


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` are kept. Calls block on the disk."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def write(self, cut: Cut, receipts: Mapping[str, Record]) -> Checkpoint:
        """Writes a cut and its receipts, then drops the oldest checkpoints. Raises OSError."""
        target = self._directory / f"{cut.epoch:08d}-{cut.step:012d}-{cut.seq:012d}"
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._drop_hidden()
            if not _is_whole(target):
                temporary = _hidden(target)
                temporary.mkdir()
                _write_cut(temporary, cut, receipts)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(temporary, target)
                _flush(self._directory)
            for old in sorted(self._directory.glob("[0-9]*"))[: -self._keep]:
                os.rename(old, _hidden(old))
        finally:
            self._drop_hidden()
        return _describe(_read_manifest(target))

    def all(self) -> list[Checkpoint]:
        """The checkpoints whose manifests can be read, oldest first."""
        return [_describe(manifest) for _, manifest in self._manifests()]

    def newest(self) -> tuple[Cut, dict[str, Record]] | None:
        """The newest checkpoint that passes its checks."""
        for directory, manifest in reversed(self._manifests()):
            try:
                return _load(directory, manifest)
            except Damaged as error:
                logger.error("checkpoint %s is damaged and skipped: %s", directory, error)
        return None

    def at(self, step: int) -> tuple[Cut, dict[str, Record]]:
        """The checkpoint of a step, of the newest epoch that has one. Raises CheckpointNotFound."""
        reason = f"there is no checkpoint of step {step}"
        for directory, manifest in reversed(self._manifests()):
            if manifest["step"] == step:
                try:
                    return _load(directory, manifest)
                except Damaged as error:
                    reason = f"the checkpoint of step {step} is damaged: {error}"
                    logger.error("checkpoint %s is damaged and skipped: %s", directory, error)
        raise CheckpointNotFound(reason, step=step)

    def _manifests(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for directory in sorted(self._directory.glob("[0-9]*")):
            try:
                found.append((directory, _read_manifest(directory)))
            except Damaged as error:
                logger.error("checkpoint %s is damaged and skipped: %s", directory, error)
        return found

    def _drop_hidden(self) -> None:
        """What is not whole yet or any more, also of services that were killed: nobody else writes here."""
        for directory in self._directory.glob(".[0-9]*"):
            shutil.rmtree(directory, ignore_errors=True)


def _hidden(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}")


def _write_cut(directory: Path, cut: Cut, receipts: Mapping[str, Record]) -> None:
    tensors = directory / "state.safetensors"
    try:
        save_file(cut.tensors, tensors)
    except SafetensorError as error:
        raise OSError(f"{tensors} could not be written: {error}") from error
    _flush(tensors)
    manifest = {
        "format": _FORMAT,
        "epoch": cut.epoch,
        "step": cut.step,
        "seq": cut.seq,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": tensors.stat().st_size,
        "tensors": _file_checksum(tensors),
        "scalars": cut.scalars,
        "group": cut.group,
        "weight": cut.weight,
        "damping": cut.damping,
        "receipts": {key: asdict(record) for key, record in receipts.items()},
    }
    text = json.dumps(manifest | {"checksum": _manifest_checksum(manifest)}, indent=1)
    _write_whole(directory / "manifest.json", text.encode())


def _is_whole(directory: Path) -> bool:
    try:
        return bool(_file_checksum(directory / "state.safetensors") == _read_manifest(directory)["tensors"])
    except (OSError, Damaged):
        return False


def _describe(manifest: dict[str, Any]) -> Checkpoint:
    return Checkpoint.model_validate(manifest)


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise Damaged(f"its manifest cannot be read ({type(error).__name__})") from error
    if checksum != _manifest_checksum(manifest):
        raise Damaged("its manifest does not have the checksum that it names")
    if manifest.get("format") != _FORMAT:
        raise Damaged(f"its format {manifest.get('format')} is not the one that this version reads")
    return dict(manifest)


def _load(directory: Path, manifest: dict[str, Any]) -> tuple[Cut, dict[str, Record]]:
    tensors = directory / "state.safetensors"
    try:
        if _file_checksum(tensors) != manifest["tensors"]:
            raise Damaged("its tensors do not have the checksum that its manifest names")
        cut = Cut(
            epoch=manifest["epoch"],
            step=manifest["step"],
            seq=manifest["seq"],
            tensors=load_file(tensors),
            scalars=manifest["scalars"],
            group=manifest["group"],
            weight=manifest["weight"],
            damping=manifest["damping"],
        )
    except OSError as error:
        raise Damaged(f"its tensors cannot be read: {error}") from error
    return cut, {key: Record(**record) for key, record in manifest["receipts"].items()}


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(4 * 1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    _flush(temporary)
    os.rename(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
