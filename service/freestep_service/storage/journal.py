"""A shard's journal, as it is written: the parts of pushes as they come, and the entries of the log.

One thread writes, in the order of the calls, and makes durable with one call of fdatasync whatever has come since the
last one. A body of a large push is written while it arrives. Space is allocated before a push is received, so that a
full disk refuses the push and not its decision.

The law of this file: the calls come from one thread (the event loop's) and return at once; what has been done is told
there too, in the order of the calls, by `post`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freestep.errors import StorageUnavailable
from freestep_service.domain.records import CheckpointId, Claim, Fenced
from freestep_service.storage.journal_format import FORMAT, Kind, encode_frame
from freestep_service.storage.journal_reader import (
    OWNER,
    JournalContents,
    JournaledPart,
    SegmentContents,
    newest_epoch,
    owners,
    segment_path,
    segment_paths,
)
from freestep_service.storage.write_back import begin_write_back

__all__ = ["Done", "Journal", "PartWriter", "remove_journals", "remove_other_journals"]

logger = logging.getLogger("freestep")

Done = Callable[[Exception | None], None]
"""Called with what went wrong, or None."""

_SMALL = 1024**2
"""Bytes of a body that is written in one go with its digest, out of memory of its own."""
_PIECE = 1024**2
"""Bytes of a large body that are handed to the thread at once, which has the disk begin with them at once."""
_STEP = 64 * 1024**2
"""Bytes that are allocated at once, at the most beside what a push needs ..."""
_FIRST_STEP = 1024**2
"""... and in a new segment."""
_MARGIN = 256 * 1024
"""Bytes kept for entries that no push makes."""
_ENTRY = 8 * 1024
"""Bytes allocated with a push for its frames and its entry."""


@dataclass
class _Segment(SegmentContents):
    """A segment that is written, or was before this process.

    size: where the next frame begins. allocated: bytes of the file. durable: where the frames end that are on disk.
    parts: how many in it are not decided.
    """

    salt: int = 0
    allocated: int = 0
    durable: int = 0
    parts: int = 0


@dataclass
class _Work:
    """What the thread is to do: write buffers, make it durable, tell of it."""

    segment: _Segment
    at: int = 0
    buffers: Sequence[bytes | memoryview] = ()
    flush: bool = False
    allocate: Sequence[int] = ()
    """Sizes that the file is to have, as the disk has room for them: the first one, or else the next."""
    truncate: bool = False
    remove: bool = False
    begins: bool = False
    """Whether an epoch begins with it, whatever has failed before."""
    done: Done | None = None
    allocated: int = 0
    """The size that the disk had room for."""
    reached: int = 0
    """Where the segment's frames end with it."""


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
        self._post = post
        self._segments: list[_Segment] = []
        self._parts: dict[str, tuple[_Segment, JournaledPart]] = {}
        self._promised = 0
        self._word = ""
        self._orphans: list[Path] = []
        self._owner: tuple[int, int] | None = None
        self._condition = threading.Condition()
        self._queue: list[_Work] = []
        self._is_wanted = self._is_closed = False
        self._failure: Exception | None = None
        """What writing failed with, until an epoch begins: the thread's."""
        self._files: dict[int, int] = {}
        """Segment -> descriptor: the thread's."""
        self._thread: threading.Thread | None = None

    # Its life

    def take_over(self) -> None:
        """Fences off whoever wrote here before; blocks. To be called before the journal is read. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._word = secrets.token_hex(8)
        kept = {path.stem.partition("-")[2] for _, path in segment_paths(self.directory)}
        words = [self._word, *(word for word in owners(self.directory) if word in kept)]
        temporary = self.directory / f".{OWNER}.{self._word}"
        temporary.write_text("\n".join([*words, ""]))
        os.replace(temporary, self.directory / OWNER)
        _flush_directory(self.directory)
        found = os.stat(self.directory / OWNER)
        self._owner = found.st_ino, found.st_mtime_ns

    def adopt(self, contents: JournalContents) -> None:
        """Takes what was read for its own: those segments are kept until a checkpoint is past them."""
        self._parts.clear()
        self._segments = [
            _Segment(each.number, each.path, each.size, each.last_seq, durable=each.size) for each in contents.segments
        ]
        chained = {segment.path for segment in self._segments}
        self._orphans = [path for _, path in segment_paths(self.directory) if path not in chained]
        for key, part in contents.parts.items():
            segment = self._segments[contents.segments.index(part.segment)]
            segment.parts += 1
            self._parts[key] = segment, part
        self.epoch, self._base = contents.epoch, contents.base
        self.newest_seq = contents.entries[-1].seq if contents.entries else 0

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
        self._rotate(done, begins=True)

    def back_to(self, seq: int) -> None:
        """The shard goes on after an entry of this epoch: those behind it are void."""
        for key in list(self._parts):
            self.forget(key)
        if self.newest_seq > seq:
            self._append(Kind.BACK, {"epoch": self.epoch, "seq": seq})
        self.newest_seq = seq

    @property
    def is_owned(self) -> bool:
        """Whether `take_over` was called."""
        return self._owner is not None

    def unavailable(self, error: OSError) -> StorageUnavailable:
        """What users are told of an error of the disk's."""
        return StorageUnavailable(f"the journal in {self.directory} cannot be written: {error.strerror or error}")

    def close(self) -> None:
        """Ends the thread when it has done what it was given; blocks."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

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
        sizes = needed + min(max(segment.allocated, _FIRST_STEP), _STEP), needed

        def tell(error: Exception | None) -> None:
            if error is not None:
                self._promised -= size
            done(error)

        self._enqueue(_Work(segment, allocate=sizes, done=tell))
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
        if (found := self._parts.pop(key, None)) is not None:
            found[0].parts -= 1

    def entry(self, members: Mapping[str, Any], done: Done) -> None:
        """Appends an entry of the log, and tells when it is on disk, and all before it.

        members: epoch, seq, and what else Redis has of it; `counts` where its push has a part here.
        """
        seq = members["seq"]
        if "key" in members and (found := self._parts.pop(members["key"], None)) is not None:
            segment = found[0]
            segment.parts -= 1
            segment.last_seq = max(segment.last_seq, seq)
            # Whoever finds that segment cut away knows that the entry is in a checkpoint.
            members = {**members, "part_in": segment.number}
        self.newest_seq = seq
        work = self._append(Kind.ENTRY, members)
        work.segment.last_seq = max(work.segment.last_seq, seq)
        work.flush, work.done = True, done
        self._enqueue(work)

    def flush(self, done: Done) -> None:
        """Tells when all that was appended is on disk."""
        segment = self._segments[-1]
        self._enqueue(_Work(segment, flush=True, done=done, reached=segment.size))

    # Checkpoints

    def next_segment(self) -> None:
        """Begins a segment, so that a checkpoint of the present state leaves the ones before it without use."""
        if self._segments and self.epoch:
            self._rotate()

    def cut(self, checkpoint: CheckpointId) -> None:
        """Drops the segments that nobody needs beside a checkpoint, which all shards have written."""
        if checkpoint.epoch != self.epoch:
            return
        while len(self._segments) > 1:
            oldest = self._segments[0]
            if oldest.parts or oldest.last_seq > checkpoint.seq:
                return
            self._enqueue(_Work(self._segments.pop(0), remove=True))

    # Its thread

    def _append(
        self,
        kind: Kind,
        head: Mapping[str, Any],
        *body: bytes | memoryview,
        reserve: int = 0,
        wake: bool = True,
        begins: bool = False,
    ) -> _Work:
        """Takes the next place for a frame, whose body is here or will be `reserve` bytes long."""
        segment = self._segments[-1]
        length = reserve or sum(map(len, body))
        salt = 0 if kind == Kind.BEGIN else segment.salt
        frame = encode_frame(kind, head, length, segment.durable, salt)
        work = _Work(segment, segment.size, (frame, *body), begins=begins)
        segment.size += len(frame) + length
        work.reached = segment.size
        if kind != Kind.ENTRY:
            self._enqueue(work, wake=wake)
        return work

    def _rotate(self, done: Done | None = None, *, begins: bool = False) -> None:
        previous = self._segments[-1] if self._segments else None
        if previous is not None and previous.allocated:
            self._enqueue(_Work(previous, truncate=True, at=previous.size))
        number = previous.number + 1 if previous else 1
        segment = _Segment(number, segment_path(self.directory, number, self._word), salt=secrets.randbits(63))
        self._segments.append(segment)
        head = {
            "format": FORMAT,
            "salt": segment.salt,
            "run": self._run,
            "id": self._run_id,
            "segment": number,
            "previous": previous and [previous.path.name, previous.durable],
            "epoch": self.epoch,
            "base": self._base,
            "seq": self.newest_seq,
        }
        self._append(Kind.BEGIN, head, begins=begins)
        self._enqueue(_Work(segment, flush=True, done=done, reached=segment.size))
        # Of those who did not know that they were taken over.
        for path in self._orphans:
            self._enqueue(_Work(_Segment(0, path), remove=True))
        self._orphans.clear()

    def _enqueue(self, work: _Work, *, wake: bool = True) -> None:
        """wake: False where work that follows needs the thread anyway."""
        if self._thread is None:
            name = f"freestep-journal-{self._run}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
        with self._condition:
            self._queue.append(work)
            if wake:
                self._is_wanted = True
                self._condition.notify()

    def _work(self) -> None:
        dirty: dict[int, _Segment] = {}
        while True:
            with self._condition:
                while not self._is_wanted and not self._is_closed:
                    self._condition.wait()
                works, self._queue, self._is_wanted = self._queue, [], False
                if not works and self._is_closed:
                    break
            self._do_all(works, dirty)
        for descriptor in self._files.values():
            os.close(descriptor)

    def _do_all(self, works: Sequence[_Work], dirty: dict[int, _Segment]) -> None:
        """Does what is queued, with one flush at the end if any asks for it."""
        failures: list[Exception | None] = []
        for work in works:
            failure: Exception | None = None
            if work.begins:
                self._failure = None
                dirty.clear()
            try:
                self._do(work)
            except (OSError, Fenced) as error:
                failure = error
                if work.buffers:
                    self._failure = self._failure or error
            if work.buffers:
                dirty[work.segment.number] = work.segment
            elif work.remove:
                # A body that broke off may have been written to it since the last flush.
                dirty.pop(work.segment.number, None)
            failures.append(failure)
        if any(work.flush for work in works):
            try:
                for number in sorted(dirty):
                    os.fdatasync(self._files[number])
                dirty.clear()
                self._require_owner()
            except (OSError, Fenced) as error:
                self._failure = self._failure or error
        failure = self._failure

        def tell() -> None:
            for work, own in zip(works, failures, strict=True):
                if work.flush and failure is None:
                    work.segment.durable = max(work.segment.durable, work.reached)
                work.segment.allocated = max(work.segment.allocated, work.allocated)
                error = own or (None if work.allocate else failure)
                if work.done is not None:
                    work.done(self.unavailable(error) if isinstance(error, OSError) else error)

        self._post(tell)

    def _do(self, work: _Work) -> None:
        segment = work.segment
        if work.remove or work.truncate:
            # Another owner may need it.
            self._require_owner()
        if work.remove:
            if (descriptor := self._files.pop(segment.number, None)) is not None:
                os.close(descriptor)
            segment.path.unlink(missing_ok=True)
            return
        if segment.number not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._files[segment.number] = os.open(segment.path, flags, 0o600)
            _flush_directory(self.directory)
        descriptor = self._files[segment.number]
        if work.allocate:
            work.allocated = _allocate(descriptor, work.allocate)
        if work.truncate:
            os.ftruncate(descriptor, work.at)
        at, buffers = work.at, [memoryview(buffer) for buffer in work.buffers]
        while buffers:
            written = os.pwritev(descriptor, buffers, at)
            at += written
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][written:]
        if at - work.at >= _PIECE:
            begin_write_back(descriptor, work.at, at - work.at)

    def _require_owner(self) -> None:
        """What was made durable before another took over, that one reads. Raises Fenced where it may be too late."""
        found = os.stat(self.directory / OWNER)
        if (found.st_ino, found.st_mtime_ns) != self._owner:
            raise Fenced


class PartWriter:
    """A push's part on its way into the journal, as it comes."""

    def __init__(self, journal: Journal, claim: Claim, length: int) -> None:
        self._journal = journal
        self._claim = claim
        self._length = length
        self._pieces: list[bytes | memoryview] = []
        self._waiting = 0
        self._frame: _Work | None = None
        self._at = 0
        if length > _SMALL:
            self._frame = journal._append(Kind.PART, {"claim": asdict(claim)}, reserve=length)
            journal.give_back(length)
            self._frame.segment.parts += 1
            self._at = self._frame.reached - length

    def write(self, piece: memoryview) -> None:
        """Takes the next bytes of the body, which do not change until `written` has told."""
        if self._frame is None:
            self._pieces.append(bytes(piece))
            return
        self._pieces.append(piece)
        self._waiting += len(piece)
        if self._waiting >= _PIECE:
            self._pass_on()

    def _pass_on(self) -> None:
        assert self._frame is not None
        if self._pieces:
            self._journal._enqueue(_Work(self._frame.segment, self._at, self._pieces))
            self._at, self._pieces, self._waiting = self._at + self._waiting, [], 0

    def written(self, done: Done) -> bool:
        """Whether the memory of the pieces may change now; else `done` tells when it may."""
        if self._frame is None:
            return True
        self._pass_on()
        self._journal._enqueue(_Work(self._frame.segment, done=done))
        return False

    def finish(self, digest: str) -> None:
        """All of the body has come."""
        journal, key = self._journal, self._claim.key
        journal.forget(key)
        if self._frame is None:
            journal.give_back(self._length)
            work = journal._append(
                Kind.PART, {"claim": asdict(self._claim), "digest": digest}, *self._pieces, wake=False
            )
            work.segment.parts += 1
        else:
            work = self._frame
            journal._append(Kind.STAGED, {"at": work.at, "segment": work.segment.number, "digest": digest}, wake=False)
        place = JournaledPart(self._claim, digest, work.segment, work.reached - self._length, self._length)
        journal._parts[key] = work.segment, place

    def abandon(self) -> None:
        """The body has not come, or is refused; to be called instead of `finish`."""
        if self._frame is None:
            self._journal.give_back(self._length)
        else:
            self._frame.segment.parts -= 1


def remove_journals(directory: Path) -> None:
    """Removes the journals of a run that is no more; what cannot be removed is logged."""
    for journal in directory.glob("*"):
        _remove(journal)
    with suppress(OSError):
        directory.rmdir()


def remove_other_journals(directory: Path, kept: Collection[str], epoch: int) -> None:
    """Removes the journals of a run that had another number of shards before an epoch; `kept` are those of now."""
    for journal in directory.glob("*"):
        if journal.name not in kept and newest_epoch(journal) < epoch:
            _remove(journal)


def _remove(directory: Path) -> None:
    try:
        for path in sorted(directory.iterdir()):
            path.unlink(missing_ok=True)
        directory.rmdir()
    except OSError as error:
        logger.warning("%s is not removed: %s", directory, error.strerror or error)


def _allocate(descriptor: int, sizes: Sequence[int]) -> int:
    """Gives a file the first of these sizes that the disk has room for, and returns it. Raises OSError."""
    for size in sizes:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                # Such a file system tells in a write that it is full.
                return size
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or size == sizes[-1]:
                raise
        else:
            return size
    raise AssertionError("there is at least one size")


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
