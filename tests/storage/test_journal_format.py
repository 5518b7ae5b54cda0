"""The frames of a journal: whatever bytes a crash, a bad disk or a sender leaves, the sound ones are found."""

from __future__ import annotations

from typing import Any

import pytest

from freestep_service.storage.journal_format import MAGIC, Frame, Kind, Tail, encode_frame, scan

SALT = 7
BODY = bytes(range(256))


def segment(*heads: dict[str, Any], durable: int = 0, body: bytes = BODY) -> tuple[bytes, list[int]]:
    """A segment of these frames, each with a body, and where each ends."""
    data = encode_frame(Kind.BEGIN, {"salt": SALT}, 0, 0, 0)
    ends = [len(data)]
    for head in heads:
        data += encode_frame(Kind.PART, head, len(body), durable, SALT) + body
        ends.append(len(data))
    return data, ends


def scanned(data: bytes) -> tuple[list[Frame], Tail]:
    *frames, tail = scan(data)
    assert isinstance(tail, Tail)
    return [frame for frame in frames if isinstance(frame, Frame)], tail


def test_frames_come_back_as_they_were_written() -> None:
    data, ends = segment({"n": 1}, {"n": 2})
    frames, tail = scanned(data)
    assert [frame.kind for frame in frames] == [Kind.BEGIN, Kind.PART, Kind.PART]
    assert [frame.head for frame in frames[1:]] == [{"n": 1}, {"n": 2}]
    assert [frame.end for frame in frames] == ends
    assert all(data[frame.body : frame.end] == BODY for frame in frames[1:])
    assert tail == Tail(len(data), 0)


def test_wherever_it_is_cut_the_frames_before_are_found() -> None:
    data, ends = segment({"n": 1}, {"n": 2})
    for length in range(len(data)):
        frames, tail = scanned(data[:length])
        whole = [end for end in ends if end <= length]
        assert [frame.end for frame in frames] == whole
        assert tail.end == (whole[-1] if whole else 0)
        assert not tail.is_damaged


@pytest.mark.parametrize("rest", [b"", bytes(1000), MAGIC * 100, b"\xff" * 777])
def test_what_is_behind_a_cut_does_not_count(rest: bytes) -> None:
    data, ends = segment({"n": 1}, {"n": 2})
    frames, tail = scanned(data[: ends[1]] + rest)
    assert len(frames) == 2
    assert tail == Tail(ends[1], 0)


def test_damage_before_what_was_on_disk_is_no_torn_tail() -> None:
    first, ends = segment({"n": 1})
    data = first + encode_frame(Kind.ENTRY, {"n": 2}, 0, ends[1], SALT)
    for at in range(ends[0], ends[1] - len(BODY)):
        broken = bytearray(data)
        broken[at] ^= 0x10
        _, tail = scanned(bytes(broken))
        assert tail.end == ends[0]
        assert tail.is_damaged


def test_a_body_that_looks_like_frames_is_none() -> None:
    # Its sender does not know the salt.
    false = encode_frame(Kind.ENTRY, {"seq": 1}, 0, 10**6, 0) + encode_frame(Kind.ENTRY, {"seq": 1}, 0, 10**6, SALT + 1)
    data, ends = segment({"n": 1}, body=false)
    frames, tail = scanned(data)
    assert len(frames) == 2
    frames, tail = scanned(data[: ends[0]] + b"\0" + data[ends[0] + 1 :])
    assert len(frames) == 1
    assert tail == Tail(ends[0], 0)


def test_only_the_first_frame_begins_a_segment() -> None:
    data, _ = segment({"n": 1})
    frames, tail = scanned(data + data)
    assert len(frames) == 2
    assert tail.end == len(data)
    assert scanned(encode_frame(Kind.PART, {"n": 1}, 0, 0, 0))[0] == []
