"""Object stores and file servers as media, through fsspec."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from freestep_service.settings import shown
from freestep_service.storage.local import require_no_links
from freestep_service.storage.medium import Storage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["FsspecStorage"]

_BLOCK = 16 * 1024 * 1024
"""Bytes requested from a remote medium at a time."""


class FsspecStorage(Storage):
    """Files behind fsspec. Their writes are as atomic as the backend's transactions are; object stores' are."""

    def __init__(self, place: str) -> None:
        for link in place.split("::"):
            fsspec.get_filesystem_class(link.partition("://")[0])
        self._place = place
        self._backends = _ThreadBackend(place)

    def __str__(self) -> str:
        """As it stands in logs and in answers."""
        return shown(self._place)

    def _write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        with self._backend(path) as (backend, target):
            backend.makedirs(target.rpartition("/")[0], exist_ok=True)
            with backend.transaction, backend.open(target, "wb") as file:
                for piece in pieces:
                    file.write(piece)

    def _read(self, path: str) -> bytes:
        with self._backend(path) as (backend, target):
            return bytes(backend.cat_file(target))

    def _open(self, path: str) -> io.BufferedReader:
        with self._backend(path) as (backend, target):
            size = int(backend.info(target)["size"])
        return io.BufferedReader(_RemoteFile(self, path, size), _BLOCK)

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a file. Raises OSError."""
        with self._backend(path) as (backend, target):
            return bytes(backend.cat_file(target, start=begin, end=end))

    def _names(self, directory: str) -> list[str]:
        with self._backend(directory) as (backend, target):
            try:
                # Some backends list the directory itself among its entries.
                found = {name.rstrip("/") for name in backend.ls(target, detail=False)} - {target}
            except FileNotFoundError:
                return []
        return sorted(name for name in (PurePosixPath(each).name for each in found) if not name.startswith("."))

    def _require_removable(self, path: str) -> None:
        with self._backend(path) as (backend, target):
            if isinstance(backend, LocalFileSystem):
                require_no_links(Path(target.removesuffix(path)), path)

    def _remove(self, path: str) -> None:
        self._require_removable(path)
        with self._backend(path) as (backend, target):
            # One by one, since a recursive removal stops at the first file that another process has removed.
            for file in backend.find(target):
                with suppress(FileNotFoundError):
                    backend.rm_file(file)
            with suppress(FileNotFoundError):
                backend.rm(target, recursive=True)

    @contextmanager
    def _backend(self, path: str) -> Iterator[tuple[Any, str]]:
        """(backend, full path). Backends raise exceptions of many kinds, which become OSErrors."""
        try:
            backend, root = self._backends.connect()
            # Other processes write here too: a backend's cached listings would be out of date.
            backend.invalidate_cache()
            yield backend, f"{root}/{path}"
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


class _ThreadBackend(threading.local):
    """A backend for each thread: a transaction is of the whole instance, which fsspec would share among threads."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._connected: tuple[Any, str] | None = None

    def connect(self) -> tuple[Any, str]:
        """(backend, root), made when first needed: some backends connect to their server when they are made."""
        if self._connected is None:
            backend, root = fsspec.core.url_to_fs(self._place, skip_instance_cache=True)
            self._connected = backend, root.rstrip("/")
        return self._connected


class _RemoteFile(io.RawIOBase):
    """A remote file, read by ranges: backends' own files differ in what they raise and in what they share."""

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
