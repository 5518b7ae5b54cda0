"""A shard's journal, as it is written: the parts of pushes as they come, and the entries of the log.

A thread writes, in the order of the calls (journal_thread.py), to the last of its segments (journal_segments.py). Parts
that are not decided are in journal_parts.py.

The law of this file: the calls come from one thread (the event loop's) and return at once; what has been done is told
there too, in the order of the calls, by `post`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from freestep_service.domain.records import CheckpointId, Claim, Fenced, LogPosition
from freestep_service.storage.journal_files import Ownership, owner_path, segment_paths
from freestep_service.storage.journal_format import Kind
from freestep_service.storage.journal_parts import JournalParts, PartWriter
from freestep_service.storage.journal_reader import JournalContents, JournaledPart
from freestep_service.storage.journal_segments import JournalSegments
from freestep_service.storage.journal_thread import Done, JournalThread

__all__ = ["Journal"]

_WORTH = 4
"""Bodies that still come are moved where segments of so many times their length are dropped then."""
_MOST_MARKED = 16
"""Segments that are begun for checkpoints of which none is written: each may be tried again for days."""
_GONE = (
    "its files are gone, as when a disk is not mounted any more: bring them back, or start the service again, "
    "which then waits for them for journal_wait_seconds"
)


class Journal:
    """The journal of elements `begin` to `end` of a run, in a directory of its own.

    post: runs a function on the thread that calls; from any thread.
    """

    def __init__(self, directory: Path, run: str, run_id: str, post: Callable[[Callable[[], None]], object]) -> None:
        self.directory = directory
        self.epoch = 0
        self.newest_seq = 0
        """The newest entry that was appended in this epoch."""
        self._base: CheckpointId | None = None
        self._thread = JournalThread(f"journal-{run}", post)
        self._segments = JournalSegments(directory, run, run_id, self._thread)
        self._parts = JournalParts()
        self._moving = 0
        """Bodies that are being moved, or for which there is to be room."""
        self._covered = CheckpointId(0, 0, 0)
        """The checkpoint behind which it was cut last."""
        self._marked = 0
        """Segments that were begun for checkpoints since."""
        self._left = 0
        """Bytes that the newest checkpoint covers and leaves, since they are needed still."""

    # Its life

    def take_over(self) -> None:
        """Fences off whoever wrote here before; blocks. To be called before the journal is read.

        Raises OSError, also where it was taken over here before and its files are gone: made anew it would be empty.
        """
        if self.is_owned and not owner_path(self.directory).exists() and not segment_paths(self.directory):
            raise FileNotFoundError(errno.ENOENT, _GONE, str(self.directory))
        self._thread.ownership = Ownership(self.directory)

    def adopt(self, contents: JournalContents) -> None:
        """Takes what was read for its own: those segments are kept until a checkpoint is past them."""
        self._segments.adopt(contents.segments)
        self._parts.clear()
        self._left = 0
        for part in contents.parts.values():
            segment = self._segments.chain[contents.segments.index(part.segment)]
            segment.parts += 1
            self._parts.add(segment, part)
        self.epoch, self._base = contents.epoch, contents.base
        self.newest_seq = contents.newest_seq

    def go_on(self) -> None:
        """Goes on behind what was adopted."""
        self._rotate(begins=True)

    def begin(self, epoch: int, base: CheckpointId | None, seq: int, done: Done) -> None:
        """Begins an epoch, in which entries follow `seq`; tells when that is on disk.

        base: the checkpoint that holds the state of then, None where none does yet.
        """
        self._parts.forget_all()
        for segment in self._segments.chain:
            segment.last_seq = 0
        self._left = 0
        self.epoch, self._base, self.newest_seq = epoch, base, seq
        self._rotate(done, begins=True, anew=True)

    def back_to(self, seq: int) -> None:
        """The shard goes on after an entry of this epoch: those behind it are void."""
        self._parts.forget_all()
        if self.newest_seq > seq:
            self._segments.append(Kind.BACK, {"epoch": self.epoch, "seq": seq})
        self.newest_seq = seq

    @property
    def has_failed(self) -> bool:
        """Whether nothing is made durable any more, until it is read anew or an epoch begins."""
        return self._thread.failure is not None

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Has a function called whenever it fails."""
        self._thread.on_failure = on_failure

    def time_flushes(self, on_flush: Callable[[float], None]) -> None:
        """Has a function called with the seconds that each flush took."""
        self._thread.on_flush = on_flush

    @property
    def word(self) -> str:
        """Under which it is written; empty before `take_over`."""
        return "" if self._thread.ownership is None else self._thread.ownership.word

    def is_present_owner(self) -> bool:
        """Whether nobody has taken it over since `take_over`; blocks. Raises OSError."""
        try:
            if self._thread.ownership is not None:
                self._thread.ownership.require()
        except Fenced:
            return False
        return self._thread.ownership is not None

    @property
    def is_owned(self) -> bool:
        """Whether `take_over` was called."""
        return self._thread.ownership is not None

    def close(self) -> None:
        """Ends the thread when it has done what it was given; blocks."""
        self._thread.close()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._segments.size

    @property
    def since_checkpoint(self) -> int:
        """Bytes on disk that the next checkpoint is to drop: without those that the newest one has left."""
        return self.size - self._left

    @property
    def lag(self) -> int:
        """Bytes that are not known to be on disk yet."""
        return self._segments.lag

    # Pushes

    def make_room(self, length: int, done: Done) -> bool:
        """Allocates space for a push with a body of that length; True where it is there, else `done` tells.

        Whoever asks gives it back by `PartWriter`, or by `give_back`. StorageUnavailable is told where there is none.
        """
        return self._segments.make_room(length, done)

    def give_back(self, length: int) -> None:
        """Gives back the space that `make_room` allocated for a push."""
        self._segments.give_back(length)

    def part(self, claim: Claim, length: int) -> PartWriter:
        """Begins with a push for which there is room."""
        return PartWriter(self._segments, self._parts, claim, length)

    def find(self, key: str) -> JournaledPart | None:
        """The part of a push that is not decided, if all of it has come."""
        return self._parts.find(key)

    def forget(self, key: str) -> None:
        """Forgets the part of a push that was refused."""
        self._parts.forget(key)

    def give_up(self, key: str, place: LogPosition) -> None:
        """Forgets the part of a push that nobody decides, by the next checkpoint that is marked behind a place.

        place: where the log stood when the push was not among those that may yet get an entry. It may have one in the
        journal of another shard, which an opening would bring here, until all shards agree on what follows the place.
        """
        self._parts.give_up(key, place)

    def entry(self, members: Mapping[str, Any], done: Done) -> None:
        """Appends an entry of the log, and tells when it is on disk, and all before it.

        members: epoch, seq, and what else Redis has of it; `counts` where its push has a part here.
        """
        seq = members["seq"]
        if "key" in members and (segment := self._parts.forget(members["key"])) is not None:
            segment.last_seq = max(segment.last_seq, seq)
            # Whoever finds that segment cut away knows that the entry is in a checkpoint.
            members = {**members, "part_in": segment.number}
        self.newest_seq = seq
        work = self._segments.append(Kind.ENTRY, members)
        work.segment.last_seq = max(work.segment.last_seq, seq)
        work.flush, work.done = True, done
        self._thread.enqueue(work)

    def flush(self, done: Done) -> None:
        """Tells when all that was appended is on disk."""
        self._segments.flush(done)

    # Checkpoints

    def next_segment(self) -> None:
        """Begins a segment, so that a checkpoint of the present state leaves the ones before it without use.

        Where none is written for long, the newest segment goes on, and is left without use by a later one.
        """
        if self._segments.chain and self.epoch and self._marked < _MOST_MARKED:
            self._marked += 1
            self._rotate()

    def cut(self, checkpoint: CheckpointId) -> None:
        """Drops the segments that nobody needs beside a checkpoint, which all shards have written."""
        if checkpoint.epoch != self.epoch:
            return
        if checkpoint != self._covered:
            self._covered, self._marked = checkpoint, 0
        self._parts.forget_given_up(LogPosition(checkpoint.epoch, checkpoint.seq))
        while len(self._segments.chain) > 1:
            oldest = self._segments.chain[0]
            if oldest.parts or oldest.last_seq > checkpoint.seq:
                break
            self._segments.drop_oldest()
        covered = (segment for segment in self._segments.chain[:-1] if segment.last_seq <= checkpoint.seq)
        self._left = sum(segment.size for segment in covered)
        self._move_coming(checkpoint)

    def _move_coming(self, checkpoint: CheckpointId) -> None:
        """Moves bodies that still come to the newest segment, where that is little beside what is dropped then.

        A body may come for as long as its sender likes, and pushes go on behind it.
        """
        kept, moved = 0, list[PartWriter]()
        for segment in self._segments.chain[:-1]:
            coming = [part for part in self._parts.coming if part.segment is segment]
            if segment.last_seq > checkpoint.seq or segment.parts > len(coming):
                break
            kept += segment.size
            moved += coming
        length = sum(part.length for part in moved)
        if not moved or kept < _WORTH * length or self._moving:
            return

        def go_on(error: Exception | None) -> None:
            if error is not None:
                self._moving = 0
                return
            self.give_back(length)
            for part in moved:
                if part in self._parts.coming:
                    part.move(self._has_moved)
                else:
                    self._has_moved()

        self._moving = len(moved)
        if self.make_room(length, go_on):
            go_on(None)

    def _has_moved(self) -> None:
        """A body has been moved, or is not to be any more."""
        self._moving -= 1
        if not self._moving:
            self.cut(self._covered)

    def _rotate(self, done: Done | None = None, *, begins: bool = False, anew: bool = False) -> None:
        head = {"epoch": self.epoch, "base": self._base, "seq": self.newest_seq, "anew": anew}
        self._segments.begin_segment(head, done, begins=begins)
