"""A directory as a medium."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from freestep_service.storage.durable import flush
from freestep_service.storage.medium import Storage

__all__ = ["LocalStorage", "require_no_links"]


class LocalStorage(Storage):
    """Files in a directory: written under a hidden name, flushed to disk and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def _write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        target = self.root / path
        _make_directory(target.parent)
        # Processes of several hosts may share the directory, so a process id does not tell them apart.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        flush(target.parent)

    def _read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def _open(self, path: str) -> io.BufferedReader:
        return (self.root / path).open("rb")

    def _names(self, directory: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / directory) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _remove(self, path: str) -> None:
        target = self.root / path
        # On a read-only medium the removal of a file that does not exist fails too.
        if not os.path.lexists(target):
            return
        self._require_removable(path)
        if not target.is_dir():
            target.unlink(missing_ok=True)
            return
        for directory, _, names in os.walk(target, topdown=False):
            for name in names:
                Path(directory, name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                os.rmdir(directory)

    def _require_removable(self, path: str) -> None:
        require_no_links(self.root, path)


def require_no_links(root: Path, path: str) -> None:
    """Raises OSError if a removal of what is at a path below the root would follow a symbolic link.

    The first directory may be a link, to another disk; what is below it belongs to one run.
    """
    first, *below = Path(path).parts
    place = root / first
    for name in below:
        place /= name
        _require_no_link(place)
    for directory, directories, _ in os.walk(place):
        for name in directories:
            _require_no_link(Path(directory, name))


def _require_no_link(place: Path) -> None:
    if place.is_symlink() and place.is_dir():
        raise OSError(errno.ELOOP, f"{place} is a symbolic link, and what it names is not removed")


def _make_directory(directory: Path) -> None:
    """Makes a directory and its parents, and flushes them, so that they survive a power failure."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        flush(directory.parent)
