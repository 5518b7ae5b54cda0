"""What storage keeps of runs beside their checkpoints.

deleted/RUN          the last epoch of a run that was deleted
deleted-before       the largest of those whose runs are forgotten
runs/RUN/run.json    spec, epoch and number of shards; without this file there is no run
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from freestep.errors import StorageUnavailable
from freestep_service.domain.records import Origin
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.medium import Storage

__all__ = ["LastEpochs", "RunFile"]


@dataclass(frozen=True)
class RunFile:
    """A run's spec, as canonical JSON, the epoch that it was opened in last, and its number of shards.

    first_epoch, id and creator: its origin; older versions wrote none.
    """

    spec: str
    epoch: int
    shards: int
    first_epoch: int = 0
    id: str = ""
    creator: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.first_epoch, self.id, self.creator)

    def write(self, storage: Storage, run: str) -> None:
        """Raises StorageUnavailable."""
        members = {name: value for name, value in asdict(self).items() if name not in Origin._fields or value}
        storage.write(f"runs/{run}/run.json", [json.dumps(members).encode()])

    @classmethod
    def read(cls, storage: Storage, run: str) -> RunFile:
        """Raises FileNotFoundError, Damaged, StorageUnavailable."""
        try:
            return _RUN_FILE.validate_json(storage.read(f"runs/{run}/run.json"), strict=True)
        except (ValidationError, IsADirectoryError) as error:
            raise Damaged(f"run.json is no run file: {error}") from error


_RUN_FILE = TypeAdapter(RunFile)


class LastEpochs:
    """The last epoch of each run that was deleted. A new run of that name begins with the next epoch.

    Otherwise a lease, a step or an ETag of the deleted run would be valid for the new one. kept: how many are known by
    name; when there are more, those of which nothing is left in this storage become one epoch for all names.
    """

    def __init__(self, storage: Storage, kept: int = 10_000) -> None:
        self._storage = storage
        self._kept = kept

    def read(self, run: str) -> int:
        """0 where no run of that name is known to have been deleted. Raises Damaged, StorageUnavailable."""
        return self._read(f"deleted/{run}")

    def read_forgotten(self) -> int:
        """The largest epoch of the deleted runs that are forgotten; 0 where none is. Raises as `read`."""
        return self._read("deleted-before")

    def _read(self, path: str) -> int:
        try:
            return int(self._storage.read(path))
        except FileNotFoundError:
            return 0
        except (ValueError, IsADirectoryError) as error:
            raise Damaged(f"{path} holds no epoch: {error}") from error

    def write(self, run: str, epoch: int) -> None:
        """Raises Damaged and StorageUnavailable."""
        self._storage.write(f"deleted/{run}", [str(epoch).encode()])
        with suppress(StorageUnavailable):
            # Else the next deletion does it.
            names = self._storage.names("deleted")
            if len(names) > self._kept:
                self._forget(set(names) - set(self._storage.names("runs")) - {run})

    def _forget(self, runs: Iterable[str]) -> None:
        epochs = {run: self.read(run) for run in runs}
        # Before any is removed.
        largest = max([self.read_forgotten(), *epochs.values()])
        self._storage.write("deleted-before", [str(largest).encode()])
        for run in epochs:
            self._storage.remove(f"deleted/{run}")
