"""What a newer version has left of a run is found before anything of the run is changed.

A version reads of it just what says so: the run's file, the marks of its checkpoints, and the beginnings of segments.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from freestep.errors import StorageUnavailable
from freestep_service.storage.checksummed import Damaged, NewerFormat, read_document
from freestep_service.storage.inventory import Inventory
from freestep_service.storage.journal_files import require_known_run
from freestep_service.storage.medium import Storage

__all__ = ["require_known_files"]


def require_known_files(storage: Storage, run: str, journals: Path) -> None:
    """Raises NewerFormat. What is missing, damaged or cannot be read is told by whoever needs it.

    journals: where those of the run's shards are on this host.
    """
    _require_known(storage, f"runs/{run}/run.json")
    try:
        marks = Inventory(storage, f"runs/{run}/checkpoints").marks()
    except StorageUnavailable:
        marks = []
    for mark in marks:
        _require_known(storage, mark)
    with suppress(OSError):
        require_known_run(journals)


def _require_known(storage: Storage, path: str) -> None:
    try:
        read_document(storage, path)
    except NewerFormat:
        raise
    except (FileNotFoundError, Damaged, StorageUnavailable):
        pass
