"""Journals without what did not reach the disk, which is cut off, or without what did, which is damage."""

from __future__ import annotations

import errno
import os

import pytest

from freestep_service.domain.records import CheckpointId
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import segment_paths
from freestep_service.storage.journal_format import Kind
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_repair import repair
from storage.journals import Writing, body, frame_places, last_segment


def test_a_torn_tail_is_cut(writing: Writing) -> None:
    writing.begin()
    writing.push("one", body())
    writing.entry(101, "one")
    writing.push("two", body(5000, 1))
    writing.entry(102, "two")
    path = last_segment(writing)
    whole = path.read_bytes()
    last = frame_places(path, Kind.ENTRY)[-1]
    for length in range(last.at, last.end, 7):
        path.write_bytes(whole[:length])
        contents = read_journal(writing.journal.directory)
        assert [entry.seq for entry in contents.entries] == [101]
        assert set(contents.parts) == {"two"}
        assert contents.torn == length - last.at


def test_a_segment_whose_predecessor_is_torn_is_part_of_the_torn_tail(writing: Writing) -> None:
    writing.begin()
    writing.entry(101)
    # Both are written, and the power fails before they are made durable: the disk had the second one first.
    first = last_segment(writing)
    kept = first.read_bytes()[: frame_places(first, Kind.ENTRY)[-1].end]
    writing.journal.entry({"epoch": 1, "seq": 102}, lambda error: None)
    writing.journal.next_segment()
    writing.flush()
    second = last_segment(writing)
    first.write_bytes(kept)
    contents = read_journal(writing.journal.directory)
    assert [entry.seq for entry in contents.entries] == [101]
    assert contents.torn >= second.stat().st_size
    other = Writing(writing.journal.directory)
    try:
        other.journal.adopt(read_journal(writing.journal.directory))
        other.journal.go_on()
        other.entry(102)
        other.flush()
        assert not second.exists()
        assert [entry.seq for entry in read_journal(writing.journal.directory).entries] == [101, 102]
    finally:
        other.journal.close()


def test_entries_that_are_gone_before_a_segment_that_was_on_disk_are_damage(writing: Writing) -> None:
    writing.begin()
    writing.entry(101)
    first = last_segment(writing)
    kept = first.read_bytes()[: frame_places(first, Kind.ENTRY)[-1].end]
    writing.entry(102)
    writing.journal.next_segment()
    for seq in (103, 104):
        writing.entry(seq)
    first.write_bytes(kept)
    with pytest.raises(Damaged, match=r"ends at byte|was on disk to entry 102"):
        read_journal(writing.journal.directory)


def test_an_entry_whose_body_did_not_reach_the_disk_is_part_of_a_torn_tail(writing: Writing) -> None:
    writing.begin()
    writing.entry(101)
    writing.push("two", body(5000, 1))
    writing.entry(102, "two")
    path = last_segment(writing)
    data = bytearray(path.read_bytes())
    part = frame_places(path, Kind.PART)[-1]
    data[part.body + 2000 : part.end] = bytes(part.end - part.body - 2000)
    path.write_bytes(data)
    assert [entry.seq for entry in read_journal(writing.journal.directory).entries] == [101]


def test_damage_of_what_was_on_disk_is_refused(writing: Writing) -> None:
    writing.begin()
    for seq in (101, 102, 103):
        writing.push(f"key-{seq}", body())
        writing.entry(seq, f"key-{seq}")
    path = last_segment(writing)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[frame_places(path, Kind.ENTRY)[0].at + 45] ^= 1
    path.write_bytes(broken)
    with pytest.raises(Damaged, match=r"is damaged at byte .*freestep journal repair"):
        read_journal(writing.journal.directory)
    broken = bytearray(whole)
    broken[frame_places(path, Kind.PART)[0].body + 5] ^= 1
    path.write_bytes(broken)
    part = read_journal(writing.journal.directory).entries[0].part
    assert part is not None
    with pytest.raises(Damaged, match="is not what was written"):
        part.check()


def test_a_segment_that_is_gone_or_short_is_noticed(writing: Writing) -> None:
    writing.begin()
    for seq in (101, 102, 103):
        writing.entry(seq)
        writing.journal.next_segment()
    writing.flush()
    paths = [path for _, path in segment_paths(writing.journal.directory)]
    second = paths[1].read_bytes()
    paths[1].write_bytes(second[: frame_places(paths[1], Kind.ENTRY)[0].at])
    with pytest.raises(Damaged, match="was on disk to"):
        read_journal(writing.journal.directory)
    paths[1].unlink()
    contents = read_journal(writing.journal.directory)
    assert [entry.seq for entry in contents.entries] == [103]
    # What is before the gap may have been cut, or not.
    assert not contents.follows(CheckpointId(1, 11, 101))


def test_what_the_disk_does_not_give_is_damage_and_a_repair_does_not_need_it(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing.begin()
    for seq in (101, 102, 103):
        writing.entry(seq, filler="x" * 2 * 1024**2)
    writing.flush()
    path = last_segment(writing)
    second = frame_places(path, Kind.ENTRY)[1]
    pread = os.pread

    def broken(descriptor: int, length: int, at: int) -> bytes:
        if os.fstat(descriptor).st_size > second.at + 1000 and at <= second.at + 1000 < at + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, length, at)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(Damaged, match="cannot be read from byte"):
        read_journal(writing.journal.directory)
    done = repair(writing.journal.directory)
    assert done is not None and (done.first, done.last) == (101, 101)
    assert [entry.seq for entry in read_journal(writing.journal.directory).entries] == [101]
    (aside,) = done.aside
    assert aside.stat().st_size > path.stat().st_size
