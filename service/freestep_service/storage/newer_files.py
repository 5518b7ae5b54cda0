"""What a newer version has left of a run is found before anything of the run is changed.

The law of this file: it goes on behind what is missing, is damaged or cannot be read, so that no newer file is passed
over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from freestep.errors import StorageUnavailable
from freestep_service.storage.checksummed import Damaged, NewerFormat, read_document
from freestep_service.storage.inventory import Inventory
from freestep_service.storage.journal_files import is_journal, require_known
from freestep_service.storage.medium import Storage

__all__ = ["require_known_beginnings", "require_known_files"]


def require_known_beginnings(storage: Storage, run: str, journals: Path) -> None:
    """Looks at the marks of a run's checkpoints, and at its journals, before its own file is read.

    journals: where those of the run's shards are on this host. Raises NewerFormat, and StorageUnavailable where no file
    is newer as far as they can be read.
    """
    look = _Look(storage)
    with look.going_on():
        look.at_documents(Inventory(storage, f"runs/{run}/checkpoints").marks())
    look.at_journals(journals)
    look.end()


def require_known_files(storage: Storage, run: str, journals: Path) -> None:
    """As `require_known_beginnings`, at all of a run's documents: before a run is made or deleted."""
    look, place = _Look(storage), f"runs/{run}"
    folders = [place, f"{place}/closed", *look.paths(f"{place}/checkpoints")]
    look.at_documents(path for folder in folders for path in look.paths(folder) if path.endswith(".json"))
    look.at_journals(journals)
    look.end()


class _Look:
    """A look at files; `end` raises what it could not read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._unread: StorageUnavailable | None = None

    def paths(self, folder: str) -> list[str]:
        with self.going_on():
            return [f"{folder}/{name}" for name in self._storage.names(folder)]
        return []

    def at_documents(self, paths: Iterable[str]) -> None:
        for path in paths:
            with self.going_on(), suppress(FileNotFoundError, Damaged):
                read_document(self._storage, path)

    def at_journals(self, journals: Path) -> None:
        for journal in filter(is_journal, journals.glob("*")):
            try:
                require_known(journal)
            except OSError as error:
                self._unread = StorageUnavailable(f"the journal {journal} cannot be read: {error.strerror or error}")

    def end(self) -> None:
        if self._unread is not None:
            raise self._unread

    @contextmanager
    def going_on(self) -> Iterator[None]:
        try:
            yield
        except NewerFormat:
            raise
        except StorageUnavailable as error:
            self._unread = error
