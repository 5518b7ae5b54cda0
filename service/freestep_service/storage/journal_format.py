"""The format of a journal's segments: frames, one behind the other.

    offset  bytes
    0       4      b"fsj1"
    4       1      kind, as in `Kind`; the next three bytes are zero
    8       4      length of the head
    12      4      zero
    16      8      length of the body
    24      8      where the segment's frames ended that were known to be on disk when this one was written
    32      8      XXH3-64 of the 32 bytes before and of the head, seeded with the segment's salt
    40             the head (JSON), then the body

Integers are little-endian. A segment begins with a frame of kind BEGIN, whose own salt is 0 and whose head names that
of the others: a body that is made to look like frames does not know it.

A frame that fails its checks is the end of a *torn tail*, which nobody was answered for, unless a frame behind it says
that this place was on disk: then the segment is *damaged*.

What a frame looks like, and that a BEGIN's head names its `format`, is for ever: so each version tells newer segments
from damaged ones. All else may change with the format, and another kind of frame is another format.

The law of this file: no IO. Whatever bytes it is given, it ends with frames, and says where they end and why.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import xxhash

__all__ = [
    "FORMAT",
    "HEADER",
    "MAGIC",
    "Content",
    "Frame",
    "Kind",
    "Tail",
    "UnknownKind",
    "encode_frame",
    "format_of",
    "scan",
]

MAGIC = b"fsj1"
FORMAT = 1
"""What a BEGIN names as its format."""
HEADER = 40
"""Bytes of a frame before its head."""
_FIELDS = struct.Struct("<4sB3xIxxxxQQ")
_CHECKSUM = struct.Struct("<Q")
_LONGEST_HEAD = 16 * 1024**2


class Kind(IntEnum):
    """What a frame tells."""

    BEGIN = 1
    """The segment: its number, salt and shard, and the state that its first entries follow."""
    PART = 2
    """The shard's part of a push: its claim, and the body as it came. A body that is still coming has no digest."""
    STAGED = 3
    """The digest of a PART before, by its place: all of its body has come."""
    ENTRY = 4
    """An entry of the run's log."""
    BACK = 5
    """The shard goes on after an entry: those behind it, so far, are void."""


class UnknownKind(ValueError):
    """A sound frame at byte `at` is of a kind that this version does not know."""

    def __init__(self, kind: int, at: int) -> None:
        super().__init__(f"a frame of kind {kind} at byte {at}, which this version does not know")
        self.at = at


class Content(Protocol):
    """The bytes of a segment, in memory or not."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, place: slice, /) -> bytes:
        """Those from a place to another, as far as there are any."""

    def find(self, pattern: bytes, begin: int, /) -> int:
        """Where a pattern is that begins at a place or behind it; -1 where it is not."""


class Frame(NamedTuple):
    """A frame of a segment. at: where it begins. body, end: where its body begins and ends.

    durable: where the segment's frames ended that were known to be on disk when this one was written.
    """

    kind: Kind
    at: int
    body: int
    end: int
    head: dict[str, Any]
    durable: int


@dataclass(frozen=True)
class Tail:
    """Where a segment's sound frames end, and up to where its frames were on disk once, as far as they tell."""

    end: int
    durable: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether frames are lost that were on disk."""
        return self.durable > self.end


def encode_frame(kind: Kind, head: Mapping[str, Any], body_length: int, durable: int, salt: int) -> bytes:
    """A frame up to its body. durable: where the segment's frames end that are on disk."""
    text = json.dumps(head, separators=(",", ":")).encode()
    fields = _FIELDS.pack(MAGIC, kind, len(text), body_length, durable)
    return b"".join((fields, _CHECKSUM.pack(_checksum(fields, text, salt)), text))


def format_of(memory: Content) -> int | None:
    """What a segment's BEGIN names as its format; None where it has no sound one, or that names none.

    Of the segments of other versions nothing else may be read.
    """
    frame = _frame_at(memory, 0, len(memory), 0)
    found = frame.head.get("format") if frame is not None and frame.kind == Kind.BEGIN else None
    return found if type(found) is int else None


def scan(memory: Content) -> Iterator[Frame | Tail]:
    """The sound frames of a segment of this format, in order; the last item is the `Tail`. Raises UnknownKind."""
    size, at, salt, durable = len(memory), 0, 0, 0
    while (frame := _frame_at(memory, at, size, salt)) is not None:
        if (frame.kind == Kind.BEGIN) != (at == 0):
            break
        durable = max(durable, frame.durable)
        if frame.durable > at:
            # A frame comes behind all that was on disk when it was written: something is missing before this one.
            break
        if at == 0:
            if type(frame.head.get("salt")) is not int:
                break
            salt = frame.head["salt"]
        yield frame
        at = frame.end
    for later in _candidates(memory, at + 1):
        if at == 0:
            # Without its BEGIN no checksum can be told; what is there must not be taken for nothing.
            durable = max(durable, _noted_at(memory, later, size))
        elif (found := _frame_at(memory, later, size, salt)) is not None and found.kind != Kind.BEGIN:
            # A sender could make a BEGIN, whose salt is no secret.
            durable = max(durable, found.durable)
    yield Tail(at, durable)


def _candidates(memory: Content, begin: int) -> Iterator[int]:
    """Where frames may begin."""
    at = memory.find(MAGIC, begin)
    while at >= 0:
        yield at
        at = memory.find(MAGIC, at + 1)


def _frame_at(memory: Content, at: int, size: int, salt: int) -> Frame | None:
    """The frame that begins at a place; None where there is no sound one."""
    if at + HEADER > size:
        return None
    fields = memory[at : at + _FIELDS.size]
    magic, kind, head_length, body_length, durable = _FIELDS.unpack(fields)
    body = at + HEADER + head_length
    if magic != MAGIC or head_length > _LONGEST_HEAD or body + body_length > size:
        return None
    text = memory[at + HEADER : body]
    (checksum,) = _CHECKSUM.unpack(memory[at + _FIELDS.size : at + HEADER])
    if checksum != _checksum(fields, text, 0 if kind == Kind.BEGIN else salt):
        return None
    try:
        known = Kind(kind)
    except ValueError:
        raise UnknownKind(kind, at) from None
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return Frame(known, at, body, body + body_length, head, durable) if isinstance(head, dict) else None


def _noted_at(memory: Content, at: int, size: int) -> int:
    """What looks like a frame says is on disk; 0 where nothing does."""
    if at + HEADER > size:
        return 0
    _, kind, head_length, body_length, durable = _FIELDS.unpack(memory[at : at + _FIELDS.size])
    is_likely = kind in list(Kind) and kind != Kind.BEGIN and at + HEADER + head_length + body_length <= size
    return int(durable) if is_likely and durable <= size else 0


def _checksum(fields: bytes, text: bytes, salt: int) -> int:
    digest = xxhash.xxh3_64(fields, seed=salt)
    digest.update(text)
    return digest.intdigest()
