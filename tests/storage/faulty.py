"""A medium that fails at one of its operations: before, halfway or after its effect."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from freestep_service.storage.local import LocalStorage
from freestep_service.storage.medium import Storage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Fault", "FaultyStorage"]

When = Literal["before", "halfway", "after"]


@dataclass(frozen=True)
class Fault:
    """Operation `at` fails, counted from 0, and those after it too, unless that is the only one.

    when: before its effect, after it, or halfway: of a file only the first bytes are written or read.
    """

    at: int
    when: When
    is_only: bool


class FaultyStorage(Storage):
    """A directory with a fault. Operations are: writing, reading and removing a file, and listing a directory."""

    def __init__(self, root: Path, fault: Fault) -> None:
        self._root = root
        self._fault = fault
        self._inner = LocalStorage(root)
        self._operations = 0

    def __str__(self) -> str:
        return "faulty"

    @property
    def has_failed(self) -> bool:
        return self._operations > self._fault.at

    def repair(self) -> None:
        """Has it work from now on."""
        self._fault = Fault(self._operations - 1, "before", is_only=True)

    def _begin(self) -> When | None:
        """Counts an operation, and returns when it is to fail; where that is before its effect, it fails here."""
        number, fault = self._operations, self._fault
        self._operations += 1
        if number < fault.at or (fault.is_only and number > fault.at):
            return None
        if fault.when == "before":
            raise failure()
        return fault.when

    def _write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        when = self._begin()
        self._inner._write(path, interrupted(pieces) if when == "halfway" else pieces)
        if when is not None:
            raise failure()

    def _require_removable(self, path: str) -> None:
        self._inner._require_removable(path)

    def _read(self, path: str) -> bytes:
        when = self._begin()
        content = self._inner._read(path)
        if when is not None:
            raise failure()
        return content

    def _open(self, path: str) -> io.BufferedReader:
        when = self._begin()
        file = self._inner._open(path)
        return file if when is None else io.BufferedReader(_Interrupted(file))

    def _names(self, directory: str) -> list[str]:
        when = self._begin()
        names = self._inner._names(directory)
        if when is not None:
            raise failure()
        return names

    def _remove(self, path: str) -> None:
        files = sorted(file for file in (self._root / path).rglob("*") if file.is_file())
        for file in [*files, self._root / path]:
            when = self._begin()
            self._inner._remove(str(file.relative_to(self._root)))
            if when is not None:
                raise failure()


class _Interrupted(io.RawIOBase):
    """A file of which only the first bytes can be read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._file.tell():
            raise failure()
        return self._file.readinto(memoryview(buffer).cast("B")[:100])

    def close(self) -> None:
        self._file.close()
        super().close()


def failure() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def interrupted(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The first half of the first piece."""
    for piece in pieces:
        yield piece[: len(piece) // 2]
        break
    raise failure()
