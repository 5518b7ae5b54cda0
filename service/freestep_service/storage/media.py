"""Which medium a place names: a directory, or a URL that fsspec understands."""

from __future__ import annotations

from pathlib import Path

from freestep_service.storage.local import LocalStorage
from freestep_service.storage.medium import Storage
from freestep_service.storage.remote import FsspecStorage

__all__ = ["FsspecStorage", "LocalStorage", "Storage", "open_storage"]


def open_storage(place: str | Path) -> Storage:
    """The storage at a path, or at a URL that fsspec understands. It touches the medium only when it is used.

    Raises ValueError for a protocol that fsspec does not know, ImportError where the package for it is not installed.
    """
    if isinstance(place, Path):
        return LocalStorage(place)
    if place.startswith("file://"):
        return LocalStorage(Path(place.removeprefix("file://")))
    if "://" in place or "::" in place:
        return FsspecStorage(place)
    return LocalStorage(Path(place))
