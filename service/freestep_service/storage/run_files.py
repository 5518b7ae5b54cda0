"""What storage keeps of runs beside their checkpoints.

deleted/RUN          the last epoch of a run that was deleted
runs/RUN/run.json    spec, epoch and number of shards; without this file there is no run
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from freestep_service.domain.records import Origin
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.medium import Storage

__all__ = ["LastEpochs", "RunFile"]


@dataclass(frozen=True)
class RunFile:
    """A run's spec, as canonical JSON, the epoch that it was opened in last, and its number of shards.

    first_epoch and id: its origin; older versions wrote none.
    """

    spec: str
    epoch: int
    shards: int
    first_epoch: int = 0
    id: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.first_epoch, self.id)

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

    Otherwise a lease, a step or an ETag of the deleted run would be valid for the new one.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, run: str) -> int:
        """0 where no run of that name was deleted. Raises Damaged, StorageUnavailable."""
        try:
            return int(self._storage.read(f"deleted/{run}"))
        except FileNotFoundError:
            return 0
        except (ValueError, IsADirectoryError) as error:
            raise Damaged(f"deleted/{run} holds no epoch: {error}") from error

    def write(self, run: str, epoch: int) -> None:
        """Raises StorageUnavailable."""
        self._storage.write(f"deleted/{run}", [str(epoch).encode()])
