"""The bytes of a journal's segment, read as they are needed.

The law of this file: what the disk does not give raises OSError. A mapping would end the process instead, and so it
would where another process makes the file shorter meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["SegmentBytes"]

_PIECE = 1024**2
_AHEAD = 64 * 1024
"""Bytes that are read at least, for what is asked for next: small frames follow each other."""


class SegmentBytes:
    """The bytes that a file had when it was opened, as a context manager; what is cut from it since reads as zeros."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size
        self._begin = 0
        self._piece = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice, /) -> bytes:
        begin, end, _ = place.indices(self._size)
        if begin < self._begin or end > self._begin + len(self._piece):
            self._begin, self._piece = begin, self._read(begin, max(end, min(begin + _AHEAD, self._size)))
        return self._piece[begin - self._begin : end - self._begin]

    def find(self, pattern: bytes, begin: int, /) -> int:
        """Where a pattern is that begins at a place or behind it; -1 where it is not."""
        while begin < self._size:
            if not self._begin <= begin < self._begin + len(self._piece):
                self._begin, self._piece = begin, self._read(begin, min(begin + _PIECE, self._size))
            # In what was read already: places that follow each other are asked for one by one.
            if (found := self._piece.find(pattern, begin - self._begin)) >= 0:
                return self._begin + found
            end = self._begin + len(self._piece)
            if end >= self._size:
                break
            # It may lie across the end of the piece.
            across = max(begin, end - len(pattern) + 1)
            self._begin, self._piece = across, self._read(across, min(across + _PIECE, self._size))
            begin = across
        return -1

    def pieces(self, begin: int, length: int) -> Iterator[bytes]:
        """A range of it, a piece at a time."""
        for at in range(begin, begin + length, _PIECE):
            yield self._read(at, min(at + _PIECE, begin + length))

    def _read(self, begin: int, end: int) -> bytes:
        found = bytearray()
        while len(found) < end - begin and (
            read := os.pread(self._descriptor, end - begin - len(found), begin + len(found))
        ):
            found += read
        return bytes(found.ljust(end - begin, b"\0"))
