"""The parts of pushes in a shard's journal: on their way there, and come but not decided.

The law of this file: a segment counts the parts in it that are not decided, those that still come among them, and is
kept for them. A body of a large push is written while it arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from freestep_service.domain.records import Claim, LogPosition
from freestep_service.storage.journal_format import Kind
from freestep_service.storage.journal_reader import JournaledPart
from freestep_service.storage.journal_segments import JournalSegments
from freestep_service.storage.journal_thread import PIECE, Done, Segment, Work

__all__ = ["JournalParts", "PartWriter"]

_SMALL = 1024**2
"""Bytes of a body that is written in one go with its digest, out of memory of its own."""
_STRIDE = 8 * 1024**2
"""Bytes of a body that are moved at once; what others write has its turn before the next."""


class JournalParts:
    """The parts of one journal that are not decided."""

    def __init__(self) -> None:
        self.coming: list[PartWriter] = []
        """Large bodies of which not all has come."""
        self._come: dict[str, tuple[Segment, JournaledPart]] = {}
        self._given_up: dict[str, LogPosition] = {}
        """Keys of pushes that may never be decided, and where the log stood when they were not."""

    def clear(self) -> None:
        """Begins anew, whatever segments have counted."""
        self._come.clear()
        self._given_up.clear()

    def add(self, segment: Segment, part: JournaledPart) -> None:
        """All of a part has come, which its segment counts."""
        self._come[part.claim.key] = segment, part

    def find(self, key: str) -> JournaledPart | None:
        """The part of a push that is not decided, if all of it has come."""
        found = self._come.get(key)
        return None if found is None else found[1]

    def forget(self, key: str) -> Segment | None:
        """Forgets a part; the segment that it is in, where all of it had come."""
        self._given_up.pop(key, None)
        found = self._come.pop(key, None)
        if found is None:
            return None
        found[0].parts -= 1
        return found[0]

    def forget_all(self) -> None:
        """Forgets all that have come."""
        for key in list(self._come):
            self.forget(key)

    def give_up(self, key: str, place: LogPosition) -> None:
        """Forgets the part of a push that nobody decides, by the next checkpoint that is marked behind a place.

        place: where the log stood when the push was not among those that may yet get an entry. It may have one in the
        journal of another shard, which an opening would bring here, until all shards agree on what follows the place.
        """
        if key in self._come:
            self._given_up[key] = place

    def forget_given_up(self, place: LogPosition) -> None:
        """Forgets those that were given up before a place."""
        for key, given_up in list(self._given_up.items()):
            if given_up < place:
                self.forget(key)


class PartWriter:
    """A push's part on its way into the journal, as it comes."""

    def __init__(self, segments: JournalSegments, parts: JournalParts, claim: Claim, length: int) -> None:
        self._segments = segments
        self._parts = parts
        self._claim = claim
        self.length = length
        self._pieces: list[bytes | memoryview] = []
        self._waiting = 0
        self._move: _Move | None = None
        self._told: Done | None = None
        """Whom to tell, once it is moved, that all of it is written."""
        self._broken: Exception | None = None
        """What moving it failed with."""
        self._frame: Work | None = None
        self._at = 0
        if length > _SMALL:
            self._frame = self._begin()
            segments.give_back(length)
            parts.coming.append(self)
            self._at = self._frame.reached - length

    def _begin(self) -> Work:
        """Begins a frame for a large body."""
        frame = self._segments.append(Kind.PART, {"claim": asdict(self._claim)}, reserve=self.length)
        frame.segment.parts += 1
        return frame

    @property
    def segment(self) -> Segment | None:
        """That which a large body is written to."""
        return None if self._frame is None else self._frame.segment

    def move(self, done: Callable[[], None]) -> None:
        """Goes on with a large body in the newest segment; tells when what has come is there, or cannot be."""
        assert self._frame is not None
        self._pass_on()
        old, self._frame = self._frame, self._begin()
        begin, to = old.reached - self.length, self._frame.reached - self.length
        self._move = _Move(old.segment, begin, self._frame.segment, to, self._at - begin, done)
        self._at += to - begin
        self._copy(self._move)

    def _copy(self, move: _Move) -> None:
        """Has the next bytes copied, if there are any and they are needed."""
        length = min(_STRIDE, move.left)
        if length == 0 or self._broken is not None:
            self._end_move(move)
            return

        def tell(error: Exception | None) -> None:
            self._broken = error
            self._copy(move)

        copied = move.source, move.begin, length
        self._segments.thread.enqueue(Work(move.segment, move.at, copied=copied, done=tell))
        move.begin, move.at, move.left = move.begin + length, move.at + length, move.left - length

    def _end_move(self, move: _Move) -> None:
        self._move = None
        move.source.parts -= 1
        if self._told is not None:
            self._tell_written(self._told)
        move.done()

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
            self._segments.thread.enqueue(Work(self._frame.segment, self._at, self._pieces))
            self._at, self._pieces, self._waiting = self._at + self._waiting, [], 0

    def written(self, done: Done) -> bool:
        """Whether the memory of the pieces may change now; else `done` tells when it may."""
        if self._frame is None:
            return True
        self._pass_on()
        self._has_come()
        if self._move is not None:
            self._told = done
        else:
            self._tell_written(done)
        return False

    def _tell_written(self, done: Done) -> None:
        assert self._frame is not None
        self._segments.thread.enqueue(Work(self._frame.segment, done=lambda error: done(error or self._broken)))

    def _has_come(self) -> None:
        """Nothing follows: it is not moved any more, of which nobody would be told."""
        with suppress(ValueError):
            self._parts.coming.remove(self)

    def finish(self, digest: str) -> None:
        """All of the body has come."""
        self._parts.forget(self._claim.key)
        if self._frame is None:
            self._segments.give_back(self.length)
            work = self._segments.append(
                Kind.PART, {"claim": asdict(self._claim), "digest": digest}, *self._pieces, wake=False
            )
            work.segment.parts += 1
        else:
            work = self._frame
            self._has_come()
            self._segments.append(
                Kind.STAGED, {"at": work.at, "segment": work.segment.number, "digest": digest}, wake=False
            )
        place = JournaledPart(self._claim, digest, work.segment, work.reached - self.length, self.length)
        self._parts.add(work.segment, place)

    def abandon(self) -> None:
        """The body has not come, or is refused; to be called instead of `finish`."""
        if self._frame is None:
            self._segments.give_back(self.length)
        else:
            self._has_come()
            self._frame.segment.parts -= 1
            if self._move is not None:
                self._move.left = 0


@dataclass
class _Move:
    """What is left to be copied of a body that is being moved: from where, to where; and whom to tell at the end."""

    source: Segment
    begin: int
    segment: Segment
    at: int
    left: int
    done: Callable[[], None]
