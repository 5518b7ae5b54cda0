"""The thread that writes a journal: what it is told in order, made durable by one fdatasync for all who wait.

The law of this file: of all work is told, in the order of the work, by `post`. Nothing is told to be durable after
another process has taken the journal over, and of what comes after the end it is told that it was not done. A segment
is removed once all before its removal is durable, and is left to the next who reads the journal where that fails.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.records import Fenced
from freestep_service.storage.durable import flush
from freestep_service.storage.journal_files import Ownership
from freestep_service.storage.journal_reader import SegmentContents
from freestep_service.storage.write_back import begin_write_back

__all__ = ["PIECE", "Done", "JournalThread", "Segment", "Work", "unavailable"]

logger = logging.getLogger("freestep")

Done = Callable[[Exception | None], None]
"""Called with what went wrong, or None."""

PIECE = 1024**2
"""Bytes of a large body that are written at once; the disk is to begin with them at once."""

_SHARE = 4
"""Of what a disk has free, the part that is allocated ahead at most: one in so many."""
_MOST_BUFFERS = 1024
"""Buffers that Linux and macOS take in one call."""


@dataclass
class Segment(SegmentContents):
    """A segment that is written, or was before this process.

    size: where the next frame begins. allocated: bytes of the file. parts: how many in it are not decided.
    """

    salt: int = 0
    allocated: int = 0
    parts: int = 0


@dataclass
class Work:
    """What the thread is to do: write buffers, make it durable, tell of it."""

    segment: Segment
    at: int = 0
    buffers: Sequence[bytes | memoryview] = ()
    flush: bool = False
    allocate: int = 0
    """The size that the file has to have at least ..."""
    ahead: int = 0
    """... and how many bytes more at most, as the disk has room for them."""
    copied: tuple[Segment, int, int] | None = None
    """What is written, where that is in a segment already: that segment, from which byte on, and how many. Where that
    fails, `done` alone is told."""
    truncate: bool = False
    remove: bool = False
    begins: bool = False
    """Whether an epoch begins with it, whatever has failed before."""
    done: Done | None = None
    allocated: int = 0
    """The size that the disk had room for."""
    reached: int = 0
    """Where the segment's frames end with it."""


class JournalThread:
    """Does work on the segments of one journal. It begins with the first.

    name: for the log. post: runs a function on the thread that gives the work; from any thread.
    """

    def __init__(self, name: str, post: Callable[[Callable[[], None]], object]) -> None:
        self.ownership: Ownership | None = None
        """Under which it writes; it is taken before there is work."""
        self.failure: Exception | None = None
        """What writing was told to have failed with; nothing is made durable until an epoch begins."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called once for each, where work is told of."""
        self.on_flush: Callable[[float], None] = lambda seconds: None
        """Called with the seconds that each flush took, where work is told of."""
        self._name = name
        self._post = post
        self._condition = threading.Condition()
        self._queue: list[Work] = []
        self._is_wanted = self._is_closed = self._has_ended = False
        self._thread: threading.Thread | None = None
        # The thread's own.
        self._failure: Exception | None = None
        """What writing failed with, until an epoch begins."""
        self._lost: dict[Path, Exception] = {}
        """Segment -> what it was not made durable for. A later flush would tell of success, whatever is on the disk."""
        self._files: dict[Path, int] = {}
        """Segment -> descriptor. By its path: its number comes again where a repair has set segments aside."""

    def enqueue(self, work: Work, *, wake: bool = True) -> None:
        """wake: False where work that follows needs the thread anyway."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"freestep-{self._name}", daemon=True)
            self._thread.start()
        with self._condition:
            if not self._has_ended:
                self._queue.append(work)
                if wake:
                    self._is_wanted = True
                    self._condition.notify()
                return
        # A body may still be coming when its shard is given up.
        if (done := work.done) is not None:
            self._post(lambda: done(ShardUnavailable("the shard is being given up")))

    def _run(self) -> None:
        dirty: dict[Path, Segment] = {}
        while True:
            with self._condition:
                while not self._is_wanted and not self._is_closed:
                    self._condition.wait()
                works, self._queue, self._is_wanted = self._queue, [], False
                if not works and self._is_closed:
                    self._has_ended = True
                    break
            begin = 0
            for index, work in enumerate(works):
                if work.begins:
                    # What is before it is to hear of the failure that it ends.
                    self._do_all(works[begin:index], dirty)
                    begin = index
            self._do_all(works[begin:], dirty)
        for descriptor in self._files.values():
            os.close(descriptor)

    def _do_all(self, works: Sequence[Work], dirty: dict[Path, Segment]) -> None:
        """Does what is queued, with one flush at the end if any asks for it. Only the first work may begin an epoch."""
        failures: list[Exception | None] = []
        removals = {index: work for index, work in enumerate(works) if work.remove}
        for work in works:
            if work.begins:
                if self._failure is not None:
                    self._lost |= dict.fromkeys(dirty, self._failure)
                self._failure = None
                dirty.clear()
            path = work.segment.path
            if work.remove:
                # Behind the flush.
                failures.append(None)
            elif path in self._lost:
                failures.append(self._lost[path])
            else:
                failures.append(self._attempt(work))
                if work.buffers or work.copied is not None:
                    dirty[path] = work.segment
        for work in removals.values():
            # A body that broke off may have been written to it since the last flush.
            dirty.pop(work.segment.path, None)
        flush_s: float | None = None
        if self._failure is None and (any(work.flush for work in works) or (removals and dirty)):
            began = monotonic()
            try:
                for segment in sorted(dirty.values(), key=lambda segment: segment.number):
                    os.fdatasync(self._files[segment.path])
                dirty.clear()
                self._require_ownership()
                flush_s = monotonic() - began
            except (OSError, Fenced) as error:
                self._failure = error
        if self._failure is None:
            for index, work in removals.items():
                failures[index] = self._attempt(work)
        failure = self._failure

        def tell() -> None:
            is_new, self.failure = failure is not None and self.failure is None, failure
            for work, own in zip(works, failures, strict=True):
                if work.flush and failure is None and own is None:
                    work.segment.durable = max(work.segment.durable, work.reached)
                work.segment.allocated = max(work.segment.allocated, work.allocated)
                error = own or (None if work.allocate else failure)
                if work.done is not None:
                    directory = work.segment.path.parent
                    work.done(unavailable(directory, error) if isinstance(error, OSError) else error)
            if is_new:
                self.on_failure()
            if flush_s is not None:
                self.on_flush(flush_s)

        self._post(tell)

    def _attempt(self, work: Work) -> Exception | None:
        """Does a work; returns what it failed with."""
        try:
            self._do(work)
        except (OSError, Fenced) as error:
            if work.buffers:
                self._failure = self._failure or error
            elif work.done is None and isinstance(error, OSError):
                logger.warning("%s: %s is not %s: %s", self._name, work.segment.path, _aim(work), error.strerror)
            return error
        return None

    def _do(self, work: Work) -> None:
        segment = work.segment
        if work.remove or work.truncate:
            # Another owner may need it.
            self._require_ownership()
        if work.remove:
            if (descriptor := self._files.pop(segment.path, None)) is not None:
                os.close(descriptor)
            segment.path.unlink(missing_ok=True)
            return
        if segment.path not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._files[segment.path] = os.open(segment.path, flags, 0o600)
            flush(segment.path.parent)
        descriptor = self._files[segment.path]
        if work.allocate:
            work.allocated = _allocate(descriptor, work.allocate, work.ahead)
        if work.truncate:
            os.ftruncate(descriptor, work.at)
        if work.copied is not None:
            source, begin, length = work.copied
            if (lost := self._lost.get(source.path)) is not None:
                raise lost
            _copy(self._files[source.path], begin, length, descriptor, work.at)
            begin_write_back(descriptor, work.at, length)
        at, buffers = work.at, [memoryview(buffer) for buffer in work.buffers]
        while buffers:
            # A body that drips in is of any number of pieces.
            written = os.pwritev(descriptor, buffers[:_MOST_BUFFERS], at)
            at += written
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][written:]
        if at - work.at >= PIECE:
            begin_write_back(descriptor, work.at, at - work.at)

    def _require_ownership(self) -> None:
        assert self.ownership is not None, "it is taken before there is work"
        self.ownership.require()

    def close(self) -> None:
        """Ends it when it has done what it was given; blocks."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()


def _copy(source: int, begin: int, length: int, descriptor: int, at: int) -> None:
    """Copies bytes that were written to a file into another. Raises OSError."""
    copied = 0
    while copied < length:
        piece = os.pread(source, min(PIECE, length - copied), begin + copied)
        if not piece:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        copied += os.pwrite(descriptor, piece, at + copied)


def _aim(work: Work) -> str:
    return "removed" if work.remove else "cut to its length"


def unavailable(directory: Path, error: OSError) -> StorageUnavailable:
    """What users are told of an error of the disk's."""
    return StorageUnavailable(f"the journal in {directory} cannot be written: {error.strerror or error}")


def _allocate(descriptor: int, size: int, ahead: int) -> int:
    """Gives a file its size, and more as the disk has room; returns what it has. Raises OSError.

    A system may take all that is left before it finds that this is not enough, and other journals would be refused
    meanwhile. So no more than a share of what is free is taken ahead. What the file has is not asked for again: a file
    system in memory goes through every page that it is asked for.
    """
    has = os.fstat(descriptor).st_size
    disk = os.fstatvfs(descriptor)
    ahead = min(ahead, disk.f_bavail * disk.f_frsize // _SHARE)
    if size + ahead <= has:
        return has
    try:
        os.posix_fallocate(descriptor, has, size + ahead - has)
    except OSError as error:
        # Such a file system tells in a write that it is full.
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return size + ahead
        # A quota may leave less than the disk.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if size > has:
            os.posix_fallocate(descriptor, has, size - has)
        return max(size, has)
    return size + ahead
