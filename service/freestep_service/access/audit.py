"""The audit log: who did what that only some may do, and who was refused what, a line of JSON each.

A line has the names of things, never a token, a path, a query or a body, so that no secret is in it.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["AuditLog", "Deed"]

logger = logging.getLogger("freestep")

_LARGEST = 64 * 1024**2
"""Bytes after which the file becomes the older of two."""
_MOST_WAITING = 1000
"""Lines that wait to be written, beyond which they are counted only: who asks in vain may ask without end."""


@dataclass(frozen=True)
class Deed:
    """What was asked of the service.

    who: the token's name and id, None where none was good. peer: the address that it came from. what: the operation.
    result: the status that it was answered with.
    """

    who: str | None
    peer: str | None
    what: str
    run: str | None
    result: int | str


class AuditLog:
    """Appends deeds to a file, on a thread of its own; several processes may share the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, "freestep-audit")
        self._waiting = 0
        self._left_out = 0
        self._has_failed = False

    def note(self, deed: Deed) -> None:
        """Notes a deed; returns at once."""
        if self._waiting >= _MOST_WAITING:
            self._left_out += 1
            return
        document = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(deed)}
        if self._left_out:
            document["left_out_before"], self._left_out = self._left_out, 0
        self._waiting += 1
        self._thread.submit(self._append, json.dumps(document) + "\n")

    def _append(self, line: str) -> None:
        try:
            # Opened for each line, since another process may have renamed it.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.write(descriptor, line.encode())
                is_full = os.fstat(descriptor).st_size > _LARGEST
            finally:
                os.close(descriptor)
            if is_full:
                os.replace(self._file, self._file.with_name(self._file.name + ".1"))
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                logger.warning("the audit log %s cannot be written: %s", self._file, error.strerror)
            self._has_failed = True
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Writes what waits."""
        self._thread.shutdown()
