"""Where checkpoints are kept: a directory, or whatever fsspec speaks to, by one small interface.

The law of this file: a file is whole or it is not there, and every failure of the medium is an OSError. What the
files mean is not known here. All calls block. Paths are relative to the place and '/'-separated; names that begin
with a dot are this file's own and are never listed.
"""

from __future__ import annotations

import io
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import fsspec

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["FsspecStorage", "LocalStorage", "Storage", "open_storage"]

_BLOCK = 16 * 1024 * 1024
"""Bytes asked of a remote medium at a time."""


class Storage(Protocol):
    """A tree of files. Every call raises OSError when the medium fails."""

    def write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes a file, or what replaces it, whole or not at all; directories are made as needed."""

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""

    def open(self, path: str) -> io.BufferedReader:
        """A file to be read from its front. Raises FileNotFoundError, at the latest when it is read."""

    def names(self, directory: str) -> list[str]:
        """What is directly inside, in order: files and directories; nothing where there is no such directory."""

    def remove(self, path: str) -> None:
        """Removes a file or a tree, also while others do the same; it need not be there."""


def open_storage(place: str | Path) -> Storage:
    """The storage at a path, or at a URL that fsspec understands.

    Raises ValueError where fsspec knows no such protocol, ImportError where what speaks it is not installed.
    """
    place = str(place)
    if place.startswith("file://"):
        return LocalStorage(Path(place.removeprefix("file://")))
    if "://" in place or "::" in place:
        return FsspecStorage(place)
    return LocalStorage(Path(place))


class LocalStorage:
    """Files in a directory: written under a hidden name, flushed to disk and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        target = self._root / path
        _make_directory(target.parent)
        # Processes of several hosts may share the directory, so a process id would not tell them apart.
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
        _flush_directory(target.parent)

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def open(self, path: str) -> io.BufferedReader:
        return (self._root / path).open("rb")

    def names(self, directory: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._root / directory) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        target = self._root / path
        if not target.is_dir():
            target.unlink(missing_ok=True)
            return
        for directory, _, names in os.walk(target, topdown=False):
            for name in names:
                Path(directory, name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                os.rmdir(directory)


def _make_directory(directory: Path) -> None:
    """Makes a directory and its parents, so that they outlast a loss of power."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        _flush_directory(directory.parent)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FsspecStorage:
    """Files behind fsspec. They appear whole so far as the backend's transactions hold, as object stores' do."""

    def __init__(self, place: str) -> None:
        for link in place.split("::"):
            fsspec.get_filesystem_class(link.partition("://")[0])
        self._place = place
        self._own = _PerThread(place)

    def __str__(self) -> str:
        return self._place

    def write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        with self._medium(path) as (backend, target):
            backend.makedirs(target.rpartition("/")[0], exist_ok=True)
            with backend.transaction, backend.open(target, "wb") as file:
                for piece in pieces:
                    file.write(piece)

    def read(self, path: str) -> bytes:
        with self._medium(path) as (backend, target):
            return bytes(backend.cat_file(target))

    def open(self, path: str) -> io.BufferedReader:
        with self._medium(path) as (backend, target):
            size = int(backend.info(target)["size"])
        return io.BufferedReader(_Ranges(self, path, size), _BLOCK)

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        with self._medium(path) as (backend, target):
            return bytes(backend.cat_file(target, start=begin, end=end))

    def names(self, directory: str) -> list[str]:
        with self._medium(directory) as (backend, target):
            try:
                # Some backends list the directory itself among what is inside.
                found = {name.rstrip("/") for name in backend.ls(target, detail=False)} - {target}
            except FileNotFoundError:
                return []
        return sorted(name for name in (PurePosixPath(each).name for each in found) if not name.startswith("."))

    def remove(self, path: str) -> None:
        with self._medium(path) as (backend, target):
            # One by one, since a recursive removal stops at the first file that somebody else removed before.
            for file in backend.find(target):
                with suppress(FileNotFoundError):
                    backend.rm_file(file)
            with suppress(FileNotFoundError):
                backend.rm(target, recursive=True)

    @contextmanager
    def _medium(self, path: str) -> Iterator[tuple[Any, str]]:
        """(backend, full path); what the backend raises leaves as OSError."""
        try:
            backend, root = self._own.connect()
            # Other processes write here too, so what a backend remembers of its listings is worth nothing.
            backend.invalidate_cache()
            yield backend, f"{root}/{path}"
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self._place}/{path}: {type(error).__name__}: {error}") from error


class _PerThread(threading.local):
    """A thread's own backend: its transactions are of the whole instance, which fsspec would share."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._connected: tuple[Any, str] | None = None

    def connect(self) -> tuple[Any, str]:
        """(backend, root); only now, since some backends greet their server when they are made."""
        if self._connected is None:
            backend, root = fsspec.core.url_to_fs(self._place, skip_instance_cache=True)
            self._connected = backend, root.rstrip("/")
        return self._connected


class _Ranges(io.RawIOBase):
    """A remote file, read by ranges: a backend's own files differ in what they raise and in what they share."""

    def __init__(self, storage: FsspecStorage, path: str, size: int) -> None:
        self._storage = storage
        self._path = path
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        if end == self._position:
            return 0
        data = self._storage.read_range(self._path, self._position, end)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
