"""What storage knows of runs beside their checkpoints.

    deleted/RUN          the last epoch of a run that was deleted
    runs/RUN/run.json    spec, epoch and number of shards

The law of this file: a run is there if its run file is, and a run that was deleted leaves its last epoch behind.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from freestep_service.storage.media import Storage

__all__ = ["LastEpochs", "RunFile"]


@dataclass(frozen=True)
class RunFile:
    """What storage knows of a run beside its checkpoints; `spec` is canonical JSON."""

    spec: str
    epoch: int
    shards: int

    def write(self, storage: Storage, run: str) -> None:
        storage.write(f"runs/{run}/run.json", [json.dumps(asdict(self)).encode()])

    @classmethod
    def read(cls, storage: Storage, run: str) -> RunFile:
        """Raises OSError or ValueError when there is none that can be read."""
        return _RUN_FILE.validate_json(storage.read(f"runs/{run}/run.json"), strict=True)


_RUN_FILE = TypeAdapter(RunFile)


class LastEpochs:
    """The last epoch of each run that was deleted: a run of the same name goes on after it.

    Else a lease, a step or an ETag of the run that is gone would pass for one of the new run's.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, run: str) -> int:
        """0 for a run that never was. Raises OSError or ValueError when it cannot be read."""
        try:
            return int(self._storage.read(f"deleted/{run}"))
        except FileNotFoundError:
            return 0

    def write(self, run: str, epoch: int) -> None:
        self._storage.write(f"deleted/{run}", [str(epoch).encode()])
