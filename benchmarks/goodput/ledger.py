"""What workers have done, in one file that they append to: a killed worker loses none of it."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["APPLIED", "COMPUTED", "SEEDED", "Entry", "Ledger", "entries"]

COMPUTED, APPLIED, SEEDED = range(3)
"""A gradient was computed; a push was acknowledged as applied; a worker's weights, of `step` pushes, began the run."""

_FORM = struct.Struct("=iiqdd")


class Entry(NamedTuple):
    """at: by the machine's monotonic clock. computed: of a push, when its gradient had been; else as `at`."""

    kind: int
    worker: int
    step: int
    at: float
    computed: float


class Ledger:
    """Appends to a file, which other processes append to as well."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def append(self, kind: int, worker: int, step: int, computed: float | None = None) -> float:
        """One write, which the kernel takes whole and keeps whatever becomes of this process; returns the time."""
        at = time.monotonic()
        os.write(self._file, _FORM.pack(kind, worker, step, at, at if computed is None else computed))
        return at


def entries(file: Path) -> list[Entry]:
    """All entries of a file, oldest first."""
    return [Entry(*fields) for fields in _FORM.iter_unpack(file.read_bytes())] if file.exists() else []
