"""What a shard's journal holds: which entries of the log, and which parts of pushes, are on disk.

The law of this file: it changes nothing. A torn tail ends the journal; damage before it raises Damaged.
What it reads may still be in memory alone (journal_rewrite.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from freestep_service.domain.records import CheckpointId, Claim
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import DamagedJournal, Link, chain, frames, repaired_epoch
from freestep_service.storage.journal_format import Frame, Kind, Tail
from freestep_service.storage.segment_bytes import SegmentBytes

__all__ = ["JournalContents", "JournaledEntry", "JournaledPart", "SegmentContents", "read_journal"]


@dataclass
class SegmentContents:
    """A segment on disk. last_seq: the newest entry that is in it, or that needs a part in it.

    durable: where the frames end that are known to be on disk.
    """

    number: int
    path: Path
    size: int = 0
    last_seq: int = 0
    durable: int = 0


@dataclass(frozen=True)
class JournaledPart:
    """A shard's part of a push, all of which has come: `length` bytes from `begin` of a segment on."""

    claim: Claim
    digest: str
    segment: SegmentContents
    begin: int
    length: int

    def read(self) -> Iterator[bytes]:
        """The body, in pieces. Raises DamagedJournal, at the end, where it is not what was written, and OSError."""
        digest, path = xxhash.xxh3_128(), self.segment.path
        try:
            with SegmentBytes(path) as content:
                for piece in content.pieces(self.begin, self.length):
                    digest.update(piece)
                    yield piece
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problem = f"{path}: the body of a push at byte {self.begin} cannot be read"
            raise DamagedJournal(path, self.begin, problem) from error
        if digest.hexdigest() != self.digest:
            problem = f"{path}: the body of a push at byte {self.begin} is not what was written"
            raise DamagedJournal(path, self.begin, problem)

    def check(self) -> None:
        """Raises DamagedJournal where the body is not what was written, and OSError."""
        for _ in self.read():
            pass


@dataclass(frozen=True)
class JournaledEntry:
    """An entry of the log, as Redis published it, and the shard's part of its push, if it is one that counts.

    at: where its frame begins in a segment.
    """

    seq: int
    members: dict[str, Any]
    part: JournaledPart | None
    segment: SegmentContents
    at: int


@dataclass
class JournalContents:
    """The newest epoch of a journal; epoch 0 where there is none.

    base: the state that its first entry follows; None where that was in no checkpoint at the time. entries: one behind
    the other. parts: those of pushes that are not decided, by idempotency key.
    """

    run_id: str = ""
    epoch: int = 0
    base: CheckpointId | None = None
    start: int = 0
    """The entry behind which those here begin: what was before it is in a checkpoint, and was cut away."""
    entries: list[JournaledEntry] = field(default_factory=list)
    parts: dict[str, JournaledPart] = field(default_factory=dict)
    segments: list[SegmentContents] = field(default_factory=list)
    torn: int = 0
    """Bytes of its torn tail."""
    repaired: int = 0
    """The newest epoch of which a repair has given up entries, 0 for none."""
    coming: dict[tuple[int, int], tuple[SegmentContents, Frame]] = field(default_factory=dict)
    """The parts of which not all is known to have come, by segment and place."""

    def follows(self, checkpoint: CheckpointId) -> bool:
        """Whether the entries go on from a checkpoint, with none missing in between."""
        start = self.entries[0].seq - 1 if self.entries else self.start
        return (checkpoint == self.base or checkpoint.epoch == self.epoch) and checkpoint.seq >= start

    @property
    def newest_seq(self) -> int:
        """The newest entry of the epoch, as far as it is known here."""
        return self.entries[-1].seq if self.entries else self.start

    def after(self, seq: int) -> list[JournaledEntry]:
        """The entries behind one."""
        return [entry for entry in self.entries if entry.seq > seq]


def read_journal(directory: Path) -> JournalContents:
    """Reads a shard's journal. Raises DamagedJournal, NewerFormat and OSError."""
    contents = JournalContents(repaired=repaired_epoch(directory))
    chained = chain(directory)
    for index, link in enumerate(chained):
        try:
            _Reading(contents, link, chained[index:]).read()
        except _Torn:
            contents.torn += sum(each.path.stat().st_size for each in chained[index:])
            break
    return contents


class _Torn(Exception):
    """A segment follows entries that are not there, and nothing says that they were on disk."""


class _Reading:
    """Adds a segment to what was read before. rest: it and those behind it."""

    def __init__(self, contents: JournalContents, link: Link, rest: Sequence[Link]) -> None:
        self._contents = contents
        self._segment = SegmentContents(link.number, link.path)
        self._limit = link.limit
        self._rest = rest

    def read(self) -> None:
        """Raises _Torn, with nothing added, where the segment does not go on from what was read before."""
        contents, segment = self._contents, self._segment
        previous = contents.segments[-1] if contents.segments else None
        contents.segments.append(segment)
        tail, end = Tail(0), None
        for found in frames(segment.path):
            if isinstance(found, Tail):
                # What an entry needs did not get to the disk, and neither did anything behind it.
                tail = found if end is None else Tail(end, found.durable)
            elif found.kind == Kind.BEGIN:
                self._begin(found, previous)
            elif self._limit is not None and found.at >= self._limit:
                tail = Tail(self._limit if end is None else end, segment.durable)
                break
            elif end is None and not self._take(found):
                end = found.at
            if isinstance(found, Frame):
                segment.durable = max(segment.durable, found.durable)
        segment.size = tail.end
        contents.torn = (self._limit or segment.path.stat().st_size) - tail.end
        if tail.is_damaged:
            raise DamagedJournal(segment.path, tail.end, f"{segment.path} is damaged at byte {tail.end}")
        self._drop_torn(tail.durable)

    def _drop_torn(self, durable: int) -> None:
        """Drops the newest entries, which nothing says to be on disk, from the first one whose body is not."""
        entries = self._contents.entries
        for index, entry in enumerate(entries):
            if entry.segment is self._segment and entry.at >= durable and entry.part is not None:
                try:
                    entry.part.check()
                except Damaged:
                    del entries[index:]
                    return

    def _begin(self, frame: Frame, previous: SegmentContents | None) -> None:
        head, contents = frame.head, self._contents
        if head["segment"] != self._segment.number:
            path = self._segment.path
            raise DamagedJournal(path, 0, f"{path} has the name of another segment than number {head['segment']}")
        if previous is not None and head["previous"] and previous.size < head["previous"][1]:
            problem = f"{previous.path} ends at byte {previous.size}, and was on disk to {head['previous'][1]}"
            raise DamagedJournal(previous.path, previous.size, problem)
        is_same = (head["id"], head["epoch"]) == (contents.run_id, contents.epoch)
        if is_same and self._goes_on(head, previous):
            return
        contents.entries, contents.parts = [], {}
        contents.run_id, contents.epoch = head["id"], head["epoch"]
        contents.start = head.get("seq", 0)
        contents.base = None if head["base"] is None else CheckpointId(*head["base"])

    def _goes_on(self, head: Mapping[str, Any], previous: SegmentContents | None) -> bool:
        """Whether the segment goes on from the entries before it; False where its epoch begins anew there.

        Raises _Torn, and DamagedJournal where entries in between were on disk.
        """
        contents, seq = self._contents, head.get("seq", 0)
        if seq > contents.newest_seq and head.get("anew"):
            # What is in between is in a checkpoint.
            return False
        if seq > contents.newest_seq and previous is not None:
            if not self._was_flushed():
                contents.segments.pop()
                raise _Torn
            problem = (
                f"{previous.path} ends with entry {contents.newest_seq} of the log, and was on disk to entry {seq}"
            )
            raise DamagedJournal(previous.path, previous.size, problem)
        contents.entries = [entry for entry in contents.entries if entry.seq <= seq or not seq]
        return True

    def _was_flushed(self) -> bool:
        """Whether this segment, or one behind it, was on disk in part: then all before it was, too."""
        for number, link in enumerate(self._rest):
            for found in frames(link.path):
                if found.durable:
                    return True
                if number and isinstance(found, Frame) and found.kind == Kind.BEGIN and found.head["previous"][1]:
                    return True
        return False

    def _take(self, frame: Frame) -> bool:
        """Takes a frame; False for an entry whose push is not there."""
        head, parts, entries = frame.head, self._contents.parts, self._contents.entries
        match frame.kind:
            case Kind.PART:
                if "digest" in head:
                    parts[head["claim"]["key"]] = _part(self._segment, frame, head["digest"])
                else:
                    self._contents.coming[self._segment.number, frame.at] = self._segment, frame
            case Kind.STAGED:
                if (coming := self._contents.coming.pop((head["segment"], head["at"]), None)) is not None:
                    segment, begun = coming
                    parts[begun.head["claim"]["key"]] = _part(segment, begun, head["digest"])
            case Kind.BACK:
                if head["epoch"] == self._contents.epoch:
                    self._contents.entries = [entry for entry in entries if entry.seq <= head["seq"]]
            case Kind.ENTRY:
                return self._take_entry(frame)
        return True

    def _take_entry(self, frame: Frame) -> bool:
        head, entries = frame.head, self._contents.entries
        seq = head["seq"]
        if head["epoch"] != self._contents.epoch:
            return True
        if entries and seq != entries[-1].seq + 1:
            problem = f"{self._segment.path} has entry {seq} of the log behind entry {entries[-1].seq}"
            raise DamagedJournal(self._segment.path, frame.at, problem)
        part = self._contents.parts.pop(head["key"], None) if "key" in head else None
        if head.get("counts"):
            if part is None:
                if head.get("part_in", self._segment.number) >= self._contents.segments[0].number:
                    return False
                # Its segment was cut away: a checkpoint that all shards have written holds it, and what is before it.
                entries.clear()
                self._contents.start = seq
                return True
            part.segment.last_seq = max(part.segment.last_seq, seq)
        self._segment.last_seq = max(self._segment.last_seq, seq)
        entries.append(JournaledEntry(seq, head, part, self._segment, frame.at))
        return True


def _part(segment: SegmentContents, frame: Frame, digest: str) -> JournaledPart:
    return JournaledPart(Claim(**frame.head["claim"]), digest, segment, frame.body, frame.end - frame.body)
