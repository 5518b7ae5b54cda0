"""What was read of a journal, made durable before it counts.

What a process had written and not flushed when it ended, or when its flush failed, is still read, and the disk may not
have it. Where a flush has failed, another one need not: the system takes what it could not write for written. So what
no frame says to be on disk is written again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from freestep_service.storage.durable import flush
from freestep_service.storage.journal_reader import JournalContents, SegmentContents

__all__ = ["write_again"]

_PIECE = 1024**2


def write_again(contents: JournalContents) -> None:
    """Raises OSError."""
    for segment in contents.segments:
        descriptor = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for begin, end in _ranges(contents, segment):
                for at in range(begin, end, _PIECE):
                    _write_again(descriptor, at, min(at + _PIECE, end))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
    if contents.segments:
        flush(contents.segments[0].path.parent)


def _ranges(contents: JournalContents, segment: SegmentContents) -> Iterator[tuple[int, int]]:
    """What of a segment may not be on disk: its newest frames, and bodies that came after frames behind them."""
    yield segment.durable, segment.size
    decided = (entry.part for entry in contents.entries if entry.at >= entry.segment.durable)
    for part in (*decided, *contents.parts.values()):
        if part is not None and part.segment is segment:
            yield part.begin, min(part.begin + part.length, segment.durable)


def _write_again(descriptor: int, at: int, end: int) -> None:
    while at < end and (piece := os.pread(descriptor, end - at, at)):
        at += os.pwrite(descriptor, piece, at)
