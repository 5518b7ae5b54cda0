"""Journals that another process goes on with: what who was taken over writes beside it does not count."""

from __future__ import annotations

import errno
import os

import pytest

from freestep.errors import StorageUnavailable
from freestep_service.domain.records import CheckpointId, Fenced
from freestep_service.storage.journal_files import is_journal_here, owner_path, segment_paths
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_repair import discard, rows
from storage.journals import LARGE, Writing, body


def test_another_process_goes_on_where_it_ended(writing: Writing) -> None:
    writing.begin()
    writing.push("first", body())
    writing.entry(101, "first")
    writing.push("undecided", body(LARGE))
    writing.flush()
    second = Writing(writing.journal.directory)
    try:
        second.journal.adopt(read_journal(writing.journal.directory))
        second.journal.go_on()
        second.entry(102, "undecided")
        contents = read_journal(writing.journal.directory)
        assert [entry.seq for entry in contents.entries] == [101, 102]
        last = contents.entries[1].part
        assert last is not None and b"".join(last.read()) == body(LARGE)
        # The first segment has the body of an entry that no checkpoint holds.
        second.journal.cut(CheckpointId(1, 11, 101))
        second.flush()
        assert len(read_journal(writing.journal.directory).segments) == 2
    finally:
        second.journal.close()


def test_segments_that_were_set_aside_are_not_written_to_when_their_numbers_come_again(writing: Writing) -> None:
    journal = writing.journal
    writing.begin()
    writing.entry(101)
    for _ in range(2):
        # As when the shard was read, and could not be opened.
        journal.take_over()
        journal.adopt(read_journal(journal.directory))
        journal.go_on()
        writing.flush()
    for _, path in segment_paths(journal.directory)[1:]:
        path.rename(path.with_name(f"{path.name}.damaged"))
    journal.take_over()
    journal.adopt(read_journal(journal.directory))
    journal.go_on()
    writing.entry(102)
    assert [entry.seq for entry in read_journal(journal.directory).entries] == [101, 102]


def test_who_was_taken_over_is_told_and_acknowledges_nothing(writing: Writing) -> None:
    writing.begin()
    writing.entry(101)
    second = Writing(writing.journal.directory)
    with pytest.raises(Fenced):
        writing.entry(102)
    with pytest.raises(Fenced):
        writing.flush()
    second.journal.close()


def test_what_is_written_by_one_who_does_not_know_that_he_was_taken_over_does_not_count(writing: Writing) -> None:
    writing.begin()
    writing.push("one", body())
    writing.entry(101, "one", mark="first")
    second = Writing(writing.journal.directory)
    try:
        second.journal.adopt(read_journal(writing.journal.directory))
        second.journal.go_on()
        second.entry(102, mark="second")
        # Both go on, in segments of the same numbers, and the first one would cut what the second one needs.
        writing.journal.next_segment()
        for seq in (102, 103, 104):
            with pytest.raises(Fenced):
                writing.entry(seq, mark="late")
        writing.journal.next_segment()
        writing.journal.cut(CheckpointId(1, 20, 104))
        with pytest.raises(Fenced):
            writing.flush()
        second.entry(103, mark="second")
        marks = [entry.members["mark"] for entry in read_journal(writing.journal.directory).entries]
        assert marks == ["first", "second", "second"]
        third = Writing(writing.journal.directory)
        third.journal.adopt(read_journal(writing.journal.directory))
        third.journal.go_on()
        third.entry(104, mark="third")
        third.flush()
        third.journal.close()
        contents = read_journal(writing.journal.directory)
        assert [entry.members["mark"] for entry in contents.entries] == [*marks, "third"]
        assert [path for _, path in segment_paths(writing.journal.directory)] == [
            segment.path for segment in contents.segments
        ]
    finally:
        second.journal.close()


def test_what_he_writes_behind_what_was_taken_over_does_not_count_either(writing: Writing) -> None:
    writing.begin()
    writing.entry(101, mark="first")
    second = Writing(writing.journal.directory)
    try:
        second.journal.adopt(read_journal(writing.journal.directory))
        second.journal.go_on()
        second.entry(102, mark="second")
        # Into the segment that was taken over, as long as no other is begun.
        for seq in (102, 103):
            with pytest.raises(Fenced):
                writing.entry(seq, mark="late")
        contents = read_journal(writing.journal.directory)
        assert [entry.members["mark"] for entry in contents.entries] == ["first", "second"]
        assert [row["seq"] for row in rows(writing.journal.directory) if row["kind"] == "entry"] == [101, 102]
    finally:
        second.journal.close()


def test_who_goes_on_after_a_repair_beside_him_writes_no_file_that_was_set_aside(writing: Writing) -> None:
    writing.begin()
    for seq in range(101, 104):
        writing.push(f"key-{seq}", body())
        writing.entry(seq, f"key-{seq}")
        writing.journal.next_segment()
    directory = writing.journal.directory
    assert discard(directory) is not None
    aside = {path: path.read_bytes() for path in directory.glob("*.damaged")}
    assert len(aside) == 4
    with pytest.raises(Fenced):
        writing.flush()
    writing.journal.take_over()
    writing.journal.adopt(read_journal(directory))
    writing.begin(2)
    # Through all numbers that segments had before.
    for seq in range(101, 106):
        writing.push(f"new-{seq}", body())
        writing.entry(seq, f"new-{seq}", epoch=2)
        writing.journal.next_segment()
    writing.flush()
    contents = read_journal(directory)
    assert (contents.epoch, [entry.seq for entry in contents.entries]) == (2, [101, 102, 103, 104, 105])
    for entry in contents.entries:
        assert entry.part is not None
        entry.part.check()
    assert {path: path.read_bytes() for path in directory.glob("*.damaged")} == aside


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_journal_is_that_of_an_owner_whose_disk_was_full(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may know that owner as the last, while others take the journal over and get no further."""
    journal = writing.journal
    writing.begin()
    writing.entry(101)

    def go_on() -> None:
        journal.take_over()
        journal.adopt(read_journal(journal.directory))
        journal.go_on()

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        go_on()
        with pytest.raises(StorageUnavailable):
            writing.flush()
    known = journal.word
    for _ in range(3):
        go_on()
        writing.flush()
        assert is_journal_here(journal.directory, known, 1)
    assert [entry.seq for entry in read_journal(journal.directory).entries] == [101]
    assert not is_journal_here(journal.directory, "0" * 16, 1)


def test_who_cannot_take_a_journal_over_leaves_no_file(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    writing.begin()
    before = {path.name: path.read_bytes() for path in writing.journal.directory.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            writing.journal.take_over()
    assert {path.name: path.read_bytes() for path in writing.journal.directory.iterdir()} == before
    assert owner_path(writing.journal.directory).name in before


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_segments_are_kept_until_the_one_behind_them_is_on_disk(
    writing: Writing, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = writing.journal
    writing.begin()
    writing.entry(101)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        journal.next_segment()
        journal.cut(CheckpointId(1, 11, 101))
        with pytest.raises(StorageUnavailable):
            writing.flush()
    first, *_ = segment_paths(journal.directory)
    assert first[0] == 1 and is_journal_here(journal.directory, journal.word, 1)
    journal.take_over()
    journal.adopt(read_journal(journal.directory))
    journal.go_on()
    writing.flush()
    journal.cut(CheckpointId(1, 11, 101))
    writing.flush()
    assert is_journal_here(journal.directory, journal.word, 1)
    assert first not in segment_paths(journal.directory)
