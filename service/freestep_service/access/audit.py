"""The audit log: who did what that only some may do, and who was refused what, a line of JSON each.

A line has the names of things, never a token, a path, a query or a body, so that no secret is in it. Who has no good
token may ask in vain without end: such refusals have a file of their own, and take the place of nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Semaphore

from freestep_service.domain.tokens import Token

__all__ = ["AuditLog", "Deed", "whose"]

logger = logging.getLogger("freestep")

_LARGEST = 64 * 1024**2
"""Bytes after which a file becomes the older of two."""
_MOST_WAITING = 1000
"""Refusals of strangers that wait to be written, beyond which they are counted only."""
_LONGEST = 256
"""Characters of a text in a line: a subject or a certificate's name may be of any length."""


@dataclass(frozen=True)
class Deed:
    """What was asked of the service.

    who: the token's name and id, None where none was good. peer: the address that it came from. what: the operation.
    run: the run's name, None where none was given that can be one. result: the status that it was answered with, the
    slug of the refusal, or what else came of it.
    """

    who: str | None
    peer: str | None
    what: str
    run: str | None
    result: int | str


def whose(token: Token) -> str:
    """A token as deeds name it: by its id, and by as much of its name as a line has room for."""
    return f"{token.name[: _LONGEST - 1 - len(token.id)]} {token.id}".strip()


class AuditLog:
    """Appends deeds to two files of a folder, on a thread for each; several processes may share them."""

    def __init__(self, folder: Path) -> None:
        self._acts = _Lines(folder / "audit.jsonl")
        self._refusals = _Lines(folder / "refusals.jsonl")
        self._places = Semaphore(_MOST_WAITING)
        self._left_out = 0

    def note(self, deed: Deed) -> None:
        """Notes a deed of somebody whose token is good; returns at once. None is left out."""
        self._acts.append(_document(deed))

    def note_stranger(self, deed: Deed) -> None:
        """Notes a refusal of somebody without a good token, or counts it while too many wait; returns at once."""
        if not self._places.acquire(blocking=False):
            self._left_out += 1
            return
        document = _document(deed)
        if self._left_out:
            document["left_out_before"], self._left_out = self._left_out, 0
        self._refusals.append(document).add_done_callback(lambda _: self._places.release())

    def close(self) -> None:
        """Writes what waits."""
        self._acts.close()
        self._refusals.close()


class _Lines:
    """A file of lines of JSON, and the older one before it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, "freestep-audit")
        self._has_failed = False

    def append(self, document: dict[str, str | int | None]) -> Future[None]:
        return self._thread.submit(self._append, json.dumps(document) + "\n")

    def _append(self, line: str) -> None:
        try:
            # Opened for each line, since another process may have renamed it.
            descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                # Another process's line would come between the two looks at the size.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _write_whole(descriptor, line.encode())
                if os.fstat(descriptor).st_size > _LARGEST:
                    self._make_older(descriptor)
            finally:
                os.close(descriptor)
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                logger.warning("the audit log %s cannot be written: %s", self._file, error.strerror)
            self._has_failed = True

    def _make_older(self, descriptor: int) -> None:
        """Renames the open file, which is locked, unless another process has: that would take the older one's place."""
        if self._file.exists() and os.path.samestat(os.fstat(descriptor), self._file.stat()):
            os.replace(self._file, self._file.with_name(self._file.name + ".1"))

    def close(self) -> None:
        self._thread.shutdown()


def _write_whole(descriptor: int, line: bytes) -> None:
    """Appends a line to a locked file, or nothing. Raises OSError."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        # Half a line, as a power cut leaves one.
        line = b"\n" + line
    if os.write(descriptor, line) < len(line):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _document(deed: Deed) -> dict[str, str | int | None]:
    fields = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in asdict(deed).items()}
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
