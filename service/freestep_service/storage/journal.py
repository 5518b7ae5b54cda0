"""A shard's journal, as it is written: the parts of pushes as they come, and the entries of the log.

A thread writes, in the order of the calls (journal_thread.py). A body of a large push is written while it arrives.
Space is allocated before a push is received, so that a full disk refuses the push and not its decision.

The law of this file: the calls come from one thread (the event loop's) and return at once; what has been done is told
there too, in the order of the calls, by `post`.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from freestep_service.domain.records import CheckpointId, Claim, Fenced, LogPosition
from freestep_service.storage.journal_files import Ownership, owner_path, segment_path, segment_paths
from freestep_service.storage.journal_format import FORMAT, Kind, encode_frame
from freestep_service.storage.journal_reader import JournalContents, JournaledPart
from freestep_service.storage.journal_thread import PIECE, Done, JournalThread, Segment, Work

__all__ = ["Done", "Journal", "PartWriter"]

_SMALL = 1024**2
"""Bytes of a body that is written in one go with its digest, out of memory of its own."""
_STEP = 64 * 1024**2
"""Bytes that are allocated at once, at the most beside what a push needs ..."""
_FIRST_STEP = 1024**2
"""... and in a new segment."""
_MARGIN = 256 * 1024
"""Bytes kept for entries that no push makes."""
_ENTRY = 8 * 1024
"""Bytes allocated with a push for its frames and its entry."""
_WORTH = 4
"""Bodies that still come are moved where segments of so many times their length are dropped then."""
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
        self._run, self._run_id = run, run_id
        self._base: CheckpointId | None = None
        self._segments: list[Segment] = []
        self._parts: dict[str, tuple[Segment, JournaledPart]] = {}
        self._given_up: dict[str, LogPosition] = {}
        """Keys of pushes that may never be decided, and where the log stood when they were not."""
        self._coming: list[PartWriter] = []
        """Large bodies of which not all has come."""
        self._is_moving = False
        self._promised = 0
        self._orphans: list[Path] = []
        self._thread = JournalThread(f"journal-{run}", post)

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
        self._parts.clear()
        self._given_up.clear()
        self._segments = [
            Segment(each.number, each.path, each.size, each.last_seq, durable=each.size) for each in contents.segments
        ]
        chained = {segment.path for segment in self._segments}
        self._orphans = [path for _, path in segment_paths(self.directory) if path not in chained]
        for key, part in contents.parts.items():
            segment = self._segments[contents.segments.index(part.segment)]
            segment.parts += 1
            self._parts[key] = segment, part
        self.epoch, self._base = contents.epoch, contents.base
        self.newest_seq = contents.newest_seq

    def go_on(self) -> None:
        """Goes on behind what was adopted."""
        self._rotate(begins=True)

    def begin(self, epoch: int, base: CheckpointId | None, seq: int, done: Done) -> None:
        """Begins an epoch, in which entries follow `seq`; tells when that is on disk.

        base: the checkpoint that holds the state of then, None where none does yet.
        """
        for key in list(self._parts):
            self.forget(key)
        for segment in self._segments:
            segment.last_seq = 0
        self.epoch, self._base, self.newest_seq = epoch, base, seq
        self._rotate(done, begins=True, anew=True)

    def back_to(self, seq: int) -> None:
        """The shard goes on after an entry of this epoch: those behind it are void."""
        for key in list(self._parts):
            self.forget(key)
        if self.newest_seq > seq:
            self._append(Kind.BACK, {"epoch": self.epoch, "seq": seq})
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
        return sum(segment.size for segment in self._segments)

    @property
    def lag(self) -> int:
        """Bytes that are not known to be on disk yet."""
        return sum(max(0, segment.size - segment.durable) for segment in self._segments)

    # Pushes

    def make_room(self, length: int, done: Done) -> bool:
        """Allocates space for a push with a body of that length; True where it is there, else `done` tells.

        Whoever asks gives it back by `PartWriter`, or by `give_back`. StorageUnavailable is told where there is none.
        """
        size = length + _ENTRY
        self._promised += size
        segment = self._segments[-1]
        needed = segment.size + self._promised + _MARGIN
        if needed <= segment.allocated:
            return True
        ahead = min(max(segment.allocated, _FIRST_STEP), _STEP)

        def tell(error: Exception | None) -> None:
            if error is not None:
                self._promised -= size
            done(error)

        self._thread.enqueue(Work(segment, allocate=needed, ahead=ahead, done=tell))
        return False

    def give_back(self, length: int) -> None:
        """Gives back the space that `make_room` allocated for a push."""
        self._promised -= length + _ENTRY

    def part(self, claim: Claim, length: int) -> PartWriter:
        """Begins with a push for which there is room."""
        return PartWriter(self, claim, length)

    def find(self, key: str) -> JournaledPart | None:
        """The part of a push that is not decided, if all of it has come."""
        found = self._parts.get(key)
        return None if found is None else found[1]

    def forget(self, key: str) -> None:
        """Forgets the part of a push that was refused."""
        self._take_part(key)

    def give_up(self, key: str, place: LogPosition) -> None:
        """Forgets the part of a push that nobody decides, by the next checkpoint that is marked behind a place.

        place: where the log stood when the push was not among those that may yet get an entry. It may have one in the
        journal of another shard, which an opening would bring here, until all shards agree on what follows the place.
        """
        if key in self._parts:
            self._given_up[key] = place

    def _take_part(self, key: str) -> Segment | None:
        """Takes the part of a push out of those that are not decided; the segment that it is in."""
        self._given_up.pop(key, None)
        found = self._parts.pop(key, None)
        if found is None:
            return None
        found[0].parts -= 1
        return found[0]

    def entry(self, members: Mapping[str, Any], done: Done) -> None:
        """Appends an entry of the log, and tells when it is on disk, and all before it.

        members: epoch, seq, and what else Redis has of it; `counts` where its push has a part here.
        """
        seq = members["seq"]
        if "key" in members and (segment := self._take_part(members["key"])) is not None:
            segment.last_seq = max(segment.last_seq, seq)
            # Whoever finds that segment cut away knows that the entry is in a checkpoint.
            members = {**members, "part_in": segment.number}
        self.newest_seq = seq
        work = self._append(Kind.ENTRY, members)
        work.segment.last_seq = max(work.segment.last_seq, seq)
        work.flush, work.done = True, done
        self._thread.enqueue(work)

    def flush(self, done: Done) -> None:
        """Tells when all that was appended is on disk."""
        segment = self._segments[-1]
        self._thread.enqueue(Work(segment, flush=True, done=done, reached=segment.size))

    # Checkpoints

    def next_segment(self) -> None:
        """Begins a segment, so that a checkpoint of the present state leaves the ones before it without use."""
        if self._segments and self.epoch:
            self._rotate()

    def cut(self, checkpoint: CheckpointId) -> None:
        """Drops the segments that nobody needs beside a checkpoint, which all shards have written."""
        if checkpoint.epoch != self.epoch:
            return
        for key, place in list(self._given_up.items()):
            if place < (checkpoint.epoch, checkpoint.seq):
                self.forget(key)
        while len(self._segments) > 1:
            oldest = self._segments[0]
            if oldest.parts or oldest.last_seq > checkpoint.seq:
                break
            self._thread.enqueue(Work(self._segments.pop(0), remove=True))
        self._move_coming(checkpoint)

    def _move_coming(self, checkpoint: CheckpointId) -> None:
        """Moves bodies that still come to the newest segment, where that is little beside what is dropped then.

        A body may come for as long as its sender likes, and pushes go on behind it.
        """
        kept, moved = 0, list[PartWriter]()
        for segment in self._segments[:-1]:
            coming = [part for part in self._coming if part.segment is segment]
            if segment.last_seq > checkpoint.seq or segment.parts > len(coming):
                break
            kept += segment.size
            moved += coming
        length = sum(part.length for part in moved)
        if not moved or kept < _WORTH * length or self._is_moving:
            return

        def go_on(error: Exception | None) -> None:
            self._is_moving = False
            if error is None:
                self.give_back(length)
                for part in moved:
                    if part in self._coming:
                        part.move()
                self.cut(checkpoint)

        self._is_moving = True
        if self.make_room(length, go_on):
            go_on(None)

    # Frames

    def _append(
        self,
        kind: Kind,
        head: Mapping[str, Any],
        *body: bytes | memoryview,
        reserve: int = 0,
        wake: bool = True,
        begins: bool = False,
    ) -> Work:
        """Takes the next place for a frame, whose body is here or will be `reserve` bytes long."""
        segment = self._segments[-1]
        length = reserve or sum(map(len, body))
        salt = 0 if kind == Kind.BEGIN else segment.salt
        frame = encode_frame(kind, head, length, segment.durable, salt)
        work = Work(segment, segment.size, (frame, *body), begins=begins)
        segment.size += len(frame) + length
        work.reached = segment.size
        if kind != Kind.ENTRY:
            self._thread.enqueue(work, wake=wake)
        return work

    def _rotate(self, done: Done | None = None, *, begins: bool = False, anew: bool = False) -> None:
        previous = self._segments[-1] if self._segments else None
        if previous is not None and previous.allocated:
            self._thread.enqueue(Work(previous, truncate=True, at=previous.size))
        assert self._thread.ownership is not None, "it is taken over before it is written"
        number = previous.number + 1 if previous else 1
        path = segment_path(self.directory, number, self._thread.ownership.word)
        segment = Segment(number, path, salt=secrets.randbits(63))
        self._segments.append(segment)
        head = {
            "format": FORMAT,
            "salt": segment.salt,
            "run": self._run,
            "id": self._run_id,
            "segment": number,
            "previous": previous and [previous.path.name, previous.durable, previous.size],
            "epoch": self.epoch,
            "base": self._base,
            "seq": self.newest_seq,
            "anew": anew,
        }
        self._append(Kind.BEGIN, head, begins=begins)
        self._thread.enqueue(Work(segment, flush=True, done=done, reached=segment.size))
        # Of those who did not know that they were taken over.
        for path in self._orphans:
            self._thread.enqueue(Work(Segment(0, path), remove=True))
        self._orphans.clear()


class PartWriter:
    """A push's part on its way into the journal, as it comes."""

    def __init__(self, journal: Journal, claim: Claim, length: int) -> None:
        self._journal = journal
        self._claim = claim
        self.length = length
        self._pieces: list[bytes | memoryview] = []
        self._waiting = 0
        self._broken: Exception | None = None
        """What moving it failed with."""
        self._frame: Work | None = None
        self._at = 0
        if length > _SMALL:
            self._frame = self._begin()
            journal.give_back(length)
            journal._coming.append(self)
            self._at = self._frame.reached - length

    def _begin(self) -> Work:
        """Begins a frame for a large body."""
        frame = self._journal._append(Kind.PART, {"claim": asdict(self._claim)}, reserve=self.length)
        frame.segment.parts += 1
        return frame

    @property
    def segment(self) -> Segment | None:
        """That which a large body is written to."""
        return None if self._frame is None else self._frame.segment

    def move(self) -> None:
        """Goes on with a large body in the newest segment."""
        assert self._frame is not None
        self._pass_on()
        old, self._frame = self._frame, self._begin()
        old.segment.parts -= 1
        begin, to = old.reached - self.length, self._frame.reached - self.length
        come = self._at - begin
        if come:
            copied = old.segment, begin, come
            self._journal._thread.enqueue(Work(self._frame.segment, to, copied=copied, done=self._moved))
        self._at = to + come

    def _moved(self, error: Exception | None) -> None:
        self._broken = self._broken or error

    def write(self, piece: memoryview) -> None:
        """Takes the next bytes of the body, which do not change until `written` has told."""
        if self._frame is None:
            self._pieces.append(bytes(piece))
            return
        self._pieces.append(piece)
        self._waiting += len(piece)
        if self._waiting >= PIECE:
            self._pass_on()

    def _pass_on(self) -> None:
        assert self._frame is not None
        if self._pieces:
            self._journal._thread.enqueue(Work(self._frame.segment, self._at, self._pieces))
            self._at, self._pieces, self._waiting = self._at + self._waiting, [], 0

    def written(self, done: Done) -> bool:
        """Whether the memory of the pieces may change now; else `done` tells when it may."""
        if self._frame is None:
            return True
        self._pass_on()
        self._has_come()
        self._journal._thread.enqueue(Work(self._frame.segment, done=lambda error: done(error or self._broken)))
        return False

    def _has_come(self) -> None:
        """Nothing follows: it is not moved any more, of which nobody would be told."""
        with suppress(ValueError):
            self._journal._coming.remove(self)

    def finish(self, digest: str) -> None:
        """All of the body has come."""
        journal, key = self._journal, self._claim.key
        journal.forget(key)
        if self._frame is None:
            journal.give_back(self.length)
            work = journal._append(
                Kind.PART, {"claim": asdict(self._claim), "digest": digest}, *self._pieces, wake=False
            )
            work.segment.parts += 1
        else:
            work = self._frame
            self._has_come()
            journal._append(Kind.STAGED, {"at": work.at, "segment": work.segment.number, "digest": digest}, wake=False)
        place = JournaledPart(self._claim, digest, work.segment, work.reached - self.length, self.length)
        journal._parts[key] = work.segment, place

    def abandon(self) -> None:
        """The body has not come, or is refused; to be called instead of `finish`."""
        if self._frame is None:
            self._journal.give_back(self.length)
        else:
            self._has_come()
            self._frame.segment.parts -= 1
