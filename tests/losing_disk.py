"""A disk that fails to make durable what was written to journals, and says so once, as Linux does.

After such a failure the system takes what was written for clean: it is read as it was written, a later flush tells of
success, and the disk does not have it.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from meanwhile import DEADLINE_S

__all__ = ["LosingDisk"]


class LosingDisk:
    """Stands between the process and its disk. failures: flushes that are to fail from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        self._lock = threading.Lock()
        self._pwritev, self._pwrite, self._fdatasync = os.pwritev, os.pwrite, os.fdatasync
        self._dirty: dict[Path, list[tuple[int, int]]] = {}
        """File -> ranges that were written since the last flush."""
        self._durable: dict[Path, bytearray] = {}
        """File -> what the disk has of it."""
        self._gate = threading.Event()
        self._gate.set()
        self._has_come = threading.Event()
        monkeypatch.setattr(os, "pwritev", self._writev)
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "fdatasync", self._sync)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block at whose end flushes go on."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def comes(self) -> None:
        """Returns when a flush waits."""
        assert self._has_come.wait(DEADLINE_S)

    def _writev(self, descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        written = self._pwritev(descriptor, buffers, at)
        self._note(descriptor, at, written)
        return written

    def _write(self, descriptor: int, data: bytes, at: int) -> int:
        written = self._pwrite(descriptor, data, at)
        self._note(descriptor, at, written)
        return written

    def _note(self, descriptor: int, at: int, length: int) -> None:
        with self._lock:
            self._dirty.setdefault(_path(descriptor), []).append((at, length))

    def _sync(self, descriptor: int) -> None:
        if not self._gate.is_set():
            self._has_come.set()
            assert self._gate.wait(DEADLINE_S)
        path = _path(descriptor)
        with self._lock:
            dirty = self._dirty.pop(path, [])
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._fdatasync(descriptor)
            for at, length in dirty:
                content = self._durable.setdefault(path, bytearray())
                content.extend(bytes(max(0, at + length - len(content))))
                content[at : at + length] = os.pread(descriptor, length, at)

    def after_power_failed(self, directory: Path, image: Path) -> Path:
        """What is on the disk of a directory, as a copy of it."""
        shutil.copytree(directory, image)
        with self._lock:
            for path in directory.rglob("*.journal"):
                content = self._durable.get(path, bytearray())
                (image / path.relative_to(directory)).write_bytes(content.ljust(path.stat().st_size, b"\0"))
        return image


def _path(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
