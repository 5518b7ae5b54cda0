"""The interface of a medium: a tree of files, in which a file is either whole or absent.

A medium that fails raises StorageUnavailable, whatever it is. This module does not know what the files mean.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from freestep.errors import StorageUnavailable

__all__ = ["Storage"]

_PROBE = ".writable", bytes(64 * 1024)
"""Name and content of the file that proves that the medium can be written: as long as a manifest with its receipts."""


class Storage(ABC):
    """A tree of files. All calls block; they may come from several threads.

    Paths are relative to the root and separated by '/'. Names that begin with a dot are temporary files, and are never
    listed. Subclasses implement the methods that begin with an underscore, which raise OSError where the medium fails.
    """

    guard: Callable[[], None] = staticmethod(lambda: None)
    """Called before anything is changed; it raises StorageUnavailable where the medium is another's by now."""

    def write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes or replaces a file, atomically, and makes its directories. Raises StorageUnavailable."""
        with self._writing():
            self._write(path, pieces)

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError, IsADirectoryError, StorageUnavailable."""
        with self._reading():
            return self._read(path)

    @contextmanager
    def open(self, path: str) -> Iterator[io.BufferedReader]:
        """A file to be read from its beginning.

        The block raises FileNotFoundError, IsADirectoryError, StorageUnavailable, at the latest when it reads.
        """
        with self._reading(), self._open(path) as file:
            yield file

    def names(self, directory: str) -> list[str]:
        """The files and directories directly inside, sorted; none where there is no such directory.

        Raises StorageUnavailable.
        """
        with self._reading():
            return self._names(directory)

    def remove(self, path: str) -> None:
        """Removes a file or a tree, if it exists; several processes may do so at once.

        Raises StorageUnavailable, also where that would empty what a symbolic link names.
        """
        with self._writing():
            self._remove(path)

    def require_writable(self) -> None:
        """Writes and removes a small hidden file. Raises StorageUnavailable.

        It is called before a change that is made in several places, which must not fail halfway on a medium that is
        full, read-only or away.
        """
        name, content = _PROBE
        with self._writing():
            self._write(name, [content])
            # Where files cannot be removed, checkpoints can still be written: this file then stays, and is replaced.
            with suppress(OSError):
                self._remove(name)

    def require_removable(self, path: str) -> None:
        """Raises StorageUnavailable where `remove` would follow a symbolic link out of a tree."""
        with self._writing():
            self._require_removable(path)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            # They concern this path and not the medium.
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error
        except OSError as error:
            raise StorageUnavailable(f"the storage {self} cannot be read: {error.strerror or error}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.guard()
        try:
            yield
        except OSError as error:
            raise StorageUnavailable(f"the storage {self} cannot be written: {error.strerror or error}") from error

    @abstractmethod
    def _write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None: ...

    @abstractmethod
    def _read(self, path: str) -> bytes: ...

    @abstractmethod
    def _open(self, path: str) -> io.BufferedReader: ...

    @abstractmethod
    def _names(self, directory: str) -> list[str]: ...

    @abstractmethod
    def _remove(self, path: str) -> None: ...

    @abstractmethod
    def _require_removable(self, path: str) -> None: ...
