"""What storage keeps of runs beside their checkpoints.

deleted/RUN          the last epoch of a run that was deleted
deleted-before       the largest of those whose runs are forgotten
runs/RUN/run.json    spec, epoch and number of shards; without this file there is no run

The epochs are numbers as text, and will be nothing else: each version reads those of all others. Run files are sealed
with a checksum. Each complete checkpoint has a copy in its mark, from which a damaged one is made
anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from freestep.api.spec import MOST_SHARDS
from freestep.errors import StorageUnavailable
from freestep_service.domain.records import Origin
from freestep_service.storage.checksummed import Damaged, parse_document, write_document
from freestep_service.storage.inventory import Inventory
from freestep_service.storage.medium import Storage

__all__ = ["LastEpochs", "RunFile"]

logger = logging.getLogger("freestep")


@dataclass(frozen=True)
class RunFile:
    """A run's spec, as canonical JSON, the epoch that it was opened in last, and its number of shards.

    first_epoch, id and creator: its origin; older versions wrote none.
    """

    spec: str
    epoch: Annotated[int, Field(ge=0)]
    shards: Annotated[int, Field(ge=1, le=MOST_SHARDS)]
    first_epoch: int = 0
    id: str = ""
    creator: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.first_epoch, self.id, self.creator)

    def members(self) -> dict[str, Any]:
        """As they stand in the file, and in the marks of checkpoints."""
        return {name: value for name, value in asdict(self).items() if name not in Origin._fields or value}

    def write(self, storage: Storage, run: str) -> None:
        """Raises StorageUnavailable."""
        write_document(storage, _path(run), self.members())

    @classmethod
    def read(cls, storage: Storage, run: str) -> RunFile:
        """The run's file. A damaged one is logged and made anew from the newest checkpoint that has a copy of it.

        Raises FileNotFoundError, StorageUnavailable, NewerFormat of it, and Damaged where no checkpoint has a copy.
        """
        try:
            return cls.read_as_is(storage, run)
        except Damaged as error:
            copies = Inventory(storage, f"runs/{run}/checkpoints", 0).run_files()
            damage = error
        for checkpoint, members in copies:
            with suppress(ValidationError):
                file = _validated(members)
                # The run may have gone on in later epochs than that in which the copy was made.
                file = replace(file, epoch=max(file.epoch, checkpoint.epoch))
                logger.error("%s of %s: it is made anew from the copy in the checkpoint %s", damage, run, checkpoint)
                with suppress(StorageUnavailable):
                    file.write(storage, run)
                return file
        raise damage

    @classmethod
    def read_as_is(cls, storage: Storage, run: str) -> RunFile:
        """The run's file. Raises FileNotFoundError, StorageUnavailable, NewerFormat, and Damaged."""
        try:
            return _of(storage.read(_path(run)), f"{storage}/{_path(run)}")
        except (Damaged, IsADirectoryError) as error:
            raise Damaged(f"run.json is no run file: {error}") from error


_RUN_FILE = TypeAdapter(RunFile)
_MEMBERS = {field.name for field in fields(RunFile)}


def _path(run: str) -> str:
    return f"runs/{run}/run.json"


def _validated(members: Any) -> RunFile:
    """Raises ValidationError."""
    # Strictly, an object of Python is none of JSON.
    return _RUN_FILE.validate_json(json.dumps(members), strict=True)


def _of(text: bytes, path: str) -> RunFile:
    """Raises Damaged, NewerFormat. Older versions wrote no checksum, and the members alone."""
    try:
        found = json.loads(text)
        is_older = isinstance(found, dict) and found.keys() <= _MEMBERS
        return _validated(found if is_older else parse_document(text, path))
    except (ValueError, RecursionError) as error:
        raise Damaged(str(error)) from error


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

    def note(self, run: str, epoch: int) -> None:
        """Notes the last epoch of a deleted run, unless a later one is known. Raises Damaged and StorageUnavailable."""
        with suppress(Damaged, StorageUnavailable):
            if self.read(run) >= epoch:
                return
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
