"""The segments of a shard's journal, as they are written: frames are appended to the last, and old ones dropped.

The law of this file: a frame has its place when it is appended, in the order of the calls, and is written later by the
thread (journal_thread.py). Space is allocated before a push is received, so that a full disk refuses the push and not
its decision.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freestep_service.storage.journal_files import segment_path, segment_paths
from freestep_service.storage.journal_format import FORMAT, Kind, encode_frame
from freestep_service.storage.journal_reader import SegmentContents
from freestep_service.storage.journal_thread import Done, JournalThread, Segment, Work

__all__ = ["JournalSegments"]

_STEP = 64 * 1024**2
"""Bytes that are allocated at once, at the most beside what a push needs ..."""
_FIRST_STEP = 1024**2
"""... and in a new segment."""
_MARGIN = 256 * 1024
"""Bytes kept for entries that no push makes."""
_ENTRY = 8 * 1024
"""Bytes allocated with a push for its frames and its entry."""


class JournalSegments:
    """The segments of one journal, which is in a directory of its own.

    thread: does the work, under the ownership that it has.
    """

    def __init__(self, directory: Path, run: str, run_id: str, thread: JournalThread) -> None:
        self.chain: list[Segment] = []
        """In their order; the last is appended to."""
        self.thread = thread
        self._directory = directory
        self._run, self._run_id = run, run_id
        self._promised = 0
        self._orphans: list[Path] = []
        """Files of those who did not know that they were taken over."""

    def adopt(self, segments: Sequence[SegmentContents]) -> None:
        """Takes segments that were read for its own, in their order."""
        self.chain = [Segment(each.number, each.path, each.size, each.last_seq, durable=each.size) for each in segments]
        chained = {segment.path for segment in self.chain}
        self._orphans = [path for _, path in segment_paths(self._directory) if path not in chained]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self.chain)

    @property
    def lag(self) -> int:
        """Bytes that are not known to be on disk yet."""
        return sum(max(0, segment.size - segment.durable) for segment in self.chain)

    # Room

    def make_room(self, length: int, done: Done) -> bool:
        """Allocates space for a push with a body of that length; True where it is there, else `done` tells.

        Whoever asks gives it back by `PartWriter`, or by `give_back`. StorageUnavailable is told where there is none.
        """
        size = length + _ENTRY
        self._promised += size
        segment = self.chain[-1]
        needed = segment.size + self._promised + _MARGIN
        if needed <= segment.allocated:
            return True
        ahead = min(max(segment.allocated, _FIRST_STEP), _STEP)

        def tell(error: Exception | None) -> None:
            if error is not None:
                self._promised -= size
            done(error)

        self.thread.enqueue(Work(segment, allocate=needed, ahead=ahead, done=tell))
        return False

    def give_back(self, length: int) -> None:
        """Gives back the space that `make_room` allocated for a push."""
        self._promised -= length + _ENTRY

    # Frames

    def append(
        self,
        kind: Kind,
        head: Mapping[str, Any],
        *body: bytes | memoryview,
        reserve: int = 0,
        wake: bool = True,
        begins: bool = False,
    ) -> Work:
        """Takes the next place for a frame, whose body is here or will be `reserve` bytes long."""
        segment = self.chain[-1]
        length = reserve or sum(map(len, body))
        salt = 0 if kind == Kind.BEGIN else segment.salt
        frame = encode_frame(kind, head, length, segment.durable, salt)
        work = Work(segment, segment.size, (frame, *body), begins=begins)
        segment.size += len(frame) + length
        work.reached = segment.size
        if kind != Kind.ENTRY:
            self.thread.enqueue(work, wake=wake)
        return work

    def begin_segment(self, head: Mapping[str, Any], done: Done | None = None, *, begins: bool = False) -> None:
        """Appends to a new segment from now on, and tells when its beginning is on disk.

        head: what follows there: `epoch`, `base`, `seq` of the entry before, and whether that is `anew`. begins: as
        `append`.
        """
        previous = self.chain[-1] if self.chain else None
        if previous is not None and previous.allocated:
            self.thread.enqueue(Work(previous, truncate=True, at=previous.size))
        assert self.thread.ownership is not None, "it is taken over before it is written"
        number = previous.number + 1 if previous else 1
        path = segment_path(self._directory, number, self.thread.ownership.word)
        segment = Segment(number, path, salt=secrets.randbits(63))
        self.chain.append(segment)
        beginning = {
            "format": FORMAT,
            "salt": segment.salt,
            "run": self._run,
            "id": self._run_id,
            "segment": number,
            "previous": previous and [previous.path.name, previous.durable, previous.size],
            **head,
        }
        self.append(Kind.BEGIN, beginning, begins=begins)
        self.flush(done)
        for path in self._orphans:
            self.thread.enqueue(Work(Segment(0, path), remove=True))
        self._orphans.clear()

    def flush(self, done: Done | None) -> None:
        """Tells when all that was appended is on disk."""
        segment = self.chain[-1]
        self.thread.enqueue(Work(segment, flush=True, done=done, reached=segment.size))

    def drop_oldest(self) -> None:
        """Drops the oldest segment."""
        self.thread.enqueue(Work(self.chain.pop(0), remove=True))
