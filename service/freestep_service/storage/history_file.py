"""The history of a run in storage: histories/RUN.json, with a checksum and with the run that it is of.

It is not in the run's directory: whoever writes it while another process deletes the run must not make that anew.
"""

from __future__ import annotations

from freestep_service.domain.history import HistoryCurves
from freestep_service.domain.records import Origin
from freestep_service.storage.checksummed import Damaged, NewerFormat, read_document, write_document
from freestep_service.storage.medium import Storage

__all__ = ["HistoryFile"]


class HistoryFile:
    """That of one run. origin: by which it is told from one that a deleted run of its name has left.

    Calls block, and raise StorageUnavailable where the medium fails.
    """

    def __init__(self, storage: Storage, run: str, origin: Origin) -> None:
        self._storage = storage
        self._path = f"histories/{run}.json"
        self._of = [origin.first_epoch, origin.id]

    def read(self) -> HistoryCurves | None:
        """The run's history; None where there is none. Raises Damaged."""
        try:
            document = read_document(self._storage, self._path)
        except FileNotFoundError:
            return None
        if document.get("of") != self._of:
            return None
        try:
            return HistoryCurves.from_document(document)
        except ValueError as error:
            raise Damaged(str(error)) from error

    def write(self, document: dict[str, object]) -> None:
        """Replaces it by what `HistoryCurves.to_document` has made."""
        write_document(self._storage, self._path, {"of": self._of, **document})

    def remove(self) -> None:
        """Removes it, if it is this run's or damaged. One of a newer version stays."""
        try:
            is_mine = self.read() is not None
        except NewerFormat:
            is_mine = False
        except Damaged:
            is_mine = True
        if is_mine:
            self._storage.remove(self._path)
