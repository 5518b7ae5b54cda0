"""Parts in a shard's journal: pushes that nobody decides, and bodies that come slowly, keep no segment for good."""

from __future__ import annotations

import errno
import os

import pytest
import xxhash

from freestep.errors import StorageUnavailable
from freestep_service.domain.records import CheckpointId, LogPosition
from freestep_service.storage import journal_parts, journal_thread
from freestep_service.storage.journal_files import segment_paths
from freestep_service.storage.journal_reader import read_journal
from storage.journals import LARGE, Writing, body, claim


def test_a_push_that_nobody_decides_keeps_no_segment_behind_the_next_checkpoint(writing: Writing) -> None:
    writing.begin()
    for key in ("given up", "decided after all", "sent again", "undecided"):
        writing.push(key, body())
    for key in ("given up", "decided after all", "sent again"):
        writing.journal.give_up(key, LogPosition(1, 101))
    writing.entry(101)
    # What was marked before it was given up may leave out what another shard knows.
    writing.journal.next_segment()
    writing.journal.cut(CheckpointId(1, 11, 101))
    assert writing.journal.find("given up") is not None
    writing.push("sent again", body())
    writing.entry(102, "decided after all")
    writing.journal.next_segment()
    writing.entry(103)
    writing.journal.cut(CheckpointId(1, 12, 102))
    assert writing.journal.find("given up") is None
    assert writing.journal.find("sent again") is not None
    writing.flush()
    # That which may still be decided has its segment.
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [1, 2, 3]
    writing.journal.give_up("undecided", LogPosition(1, 102))
    writing.journal.give_up("unknown", LogPosition(1, 102))
    writing.entry(104, "sent again")
    writing.journal.next_segment()
    writing.journal.cut(CheckpointId(1, 13, 104))
    writing.flush()
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [4]
    assert not writing.journal._parts._come and not writing.journal._parts._given_up


def test_a_body_that_comes_slowly_is_moved_from_segments_that_are_needed_for_nothing_else(writing: Writing) -> None:
    """However long it takes, the journal is no longer than a few times what has come since the last checkpoint."""
    writing.begin()
    journal, slow, fast = writing.journal, body(LARGE, 1), body(LARGE, 2)
    part = writing.part("slow", LARGE)
    longest, seq, pieces = 0, 100, 12
    for number in range(pieces):
        begin, end = LARGE * number // pieces, LARGE * (number + 1) // pieces
        part.write(memoryview(slow)[begin:end])
        for _ in range(2):
            seq += 1
            writing.push(f"fast-{seq}", fast)
            writing.entry(seq, f"fast-{seq}")
        journal.next_segment()
        journal.cut(CheckpointId(1, seq, seq))
        moved(writing)
        longest = max(longest, journal.size)
        files = [path for _, path in segment_paths(journal.directory)]
        assert len(files) == len(journal._segments.chain)
    assert longest < 8 * LARGE
    writing.wait(part.written)
    part.finish(xxhash.xxh3_128_hexdigest(slow))
    writing.entry(seq + 1, "slow")
    entry = read_journal(journal.directory).entries[-1]
    assert entry.part is not None and b"".join(entry.part.read()) == slow
    assert not journal._parts.coming and sum(segment.parts for segment in journal._segments.chain) == 0
    journal.next_segment()
    journal.cut(CheckpointId(1, seq + 1, seq + 1))
    writing.flush()
    assert len(segment_paths(journal.directory)) == 1


def moved(writing: Writing) -> None:
    """Returns once the bodies are moved that are to be, and what was kept for them is dropped."""
    writing.flush()
    while writing.journal._moving:
        writing.flush()
    writing.flush()


@pytest.mark.parametrize("how", ["goes on", "has come", "breaks off"])
def test_others_write_while_a_body_is_moved(writing: Writing, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(journal_parts, "_STRIDE", LARGE // 4)
    writing.begin()
    journal, content = writing.journal, body(LARGE)
    part = writing.part("slow", LARGE)
    part.write(memoryview(content)[: LARGE if how == "has come" else LARGE // 2])
    writing.push_all(range(101, 106), content)
    journal.next_segment()
    # So that there is room at once.
    writing.wait(lambda done: journal.make_room(LARGE, done) and done(None))
    journal.give_back(LARGE)
    journal.cut(CheckpointId(1, 15, 105))
    outcomes: list[Exception | None] = []
    if how == "has come":
        assert not part.written(outcomes.append)
    elif how == "breaks off":
        part.abandon()
    writing.entry(106)
    # Not behind all of the body.
    assert (journal._moving, outcomes) == (1, []) or how == "breaks off"
    if how == "goes on":
        part.write(memoryview(content)[LARGE // 2 :])
    moved(writing)
    assert [number for number, _ in segment_paths(journal.directory)] == [2]
    if how == "breaks off":
        assert sum(segment.parts for segment in journal._segments.chain) == 0
        return
    if how == "goes on":
        writing.wait(part.written)
    else:
        assert outcomes == [None]
    part.finish(xxhash.xxh3_128_hexdigest(content))
    writing.entry(107, "slow")
    entry = read_journal(journal.directory).entries[-1]
    assert entry.part is not None and b"".join(entry.part.read()) == content


def test_a_body_that_was_moved_may_break_off_and_the_epoch_end(writing: Writing) -> None:
    writing.begin()
    journal = writing.journal
    broken, whole, _ = [writing.part(key, LARGE) for key in ("broken", "whole", "not begun")]
    whole.write(memoryview(body(LARGE))[:1000])
    writing.push_all(range(101, 117), body(LARGE))
    journal.next_segment()
    journal.cut(CheckpointId(1, 16, 116))
    moved(writing)
    assert [number for number, _ in segment_paths(journal.directory)] == [2]
    broken.abandon()
    writing.begin(2, CheckpointId(2, 16, 116), 116)
    whole.write(memoryview(body(LARGE))[1000:])
    writing.wait(whole.written)
    whole.finish(xxhash.xxh3_128_hexdigest(body(LARGE)))
    writing.entry(117, "whole", epoch=2)
    (entry,) = read_journal(journal.directory).entries
    assert entry.part is not None and b"".join(entry.part.read()) == body(LARGE)
    assert [part.segment.number for part in journal._parts.coming if part.segment] == [2]


def test_a_body_is_not_moved_where_there_is_no_room_for_it(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    writing.begin()
    journal = writing.journal
    part = writing.part("slow", LARGE)
    part.write(memoryview(body(LARGE)))
    writing.push_all(range(101, 106), body(LARGE))
    journal.next_segment()
    promised = journal._segments._promised

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(journal_thread, "_allocate", full)
        journal.cut(CheckpointId(1, 15, 105))
        writing.flush()
        assert [number for number, _ in segment_paths(journal.directory)] == [1, 2]
    assert journal._segments._promised == promised and not journal.has_failed
    journal.cut(CheckpointId(1, 15, 105))
    moved(writing)
    assert [number for number, _ in segment_paths(journal.directory)] == [2]
    writing.wait(part.written)
    part.finish(xxhash.xxh3_128_hexdigest(body(LARGE)))
    writing.entry(106, "slow")
    (entry,) = read_journal(journal.directory).entries
    assert entry.part is not None and b"".join(entry.part.read()) == body(LARGE)


@pytest.mark.parametrize("cause", ["it cannot be read", "it was lost before"])
def test_a_body_that_cannot_be_moved_is_refused_and_nothing_else(
    writing: Writing, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    writing.begin()
    journal = writing.journal
    part = writing.part("slow", LARGE)
    with monkeypatch.context() as patched:
        if cause == "it was lost before":
            patched.setattr(os, "pwritev", broken_disk)
        part.write(memoryview(body(LARGE))[: LARGE // 2])
        if cause == "it was lost before":
            with pytest.raises(StorageUnavailable):
                writing.flush()
    if journal.has_failed:
        writing.begin(2, CheckpointId(2, 10, 100))
    epoch = journal.epoch
    writing.push_all(range(101, 106), body(LARGE), epoch)
    journal.next_segment()
    with monkeypatch.context() as patched:
        if cause == "it cannot be read":
            patched.setattr(os, "pread", broken_disk)
        journal.cut(CheckpointId(epoch, 15, 105))
        moved(writing)
    assert len(segment_paths(journal.directory)) == 1 and not journal.has_failed
    part.write(memoryview(body(LARGE))[LARGE // 2 :])
    with pytest.raises(StorageUnavailable, match="Input/output error"):
        writing.wait(part.written)
    part.abandon()
    writing.push("key-106", body(LARGE))
    writing.entry(106, "key-106", epoch=epoch)
    contents = read_journal(journal.directory)
    assert [entry.seq for entry in contents.entries] == [106] and not contents.parts


def test_a_body_that_has_come_is_not_moved_while_it_is_decoded(writing: Writing) -> None:
    writing.begin()
    journal = writing.journal
    part = writing.part("slow", LARGE)
    part.write(memoryview(body(LARGE)))
    writing.push_all(range(101, 106), body(LARGE))
    writing.wait(part.written)
    journal.next_segment()
    journal.cut(CheckpointId(1, 15, 105))
    writing.flush()
    writing.flush()
    assert len(segment_paths(journal.directory)) == 2
    part.finish(xxhash.xxh3_128_hexdigest(body(LARGE)))
    writing.entry(106, "slow")
    assert read_journal(journal.directory).entries[-1].part is not None


def broken_disk(*_: object) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_a_segment_is_removed_that_a_broken_body_was_written_to(writing: Writing) -> None:
    writing.begin()
    writing.wait(lambda done: writing.journal.make_room(LARGE, done))
    part = writing.journal.part(claim("broken"), LARGE)
    writing.journal.next_segment()
    writing.entry(101)
    part.write(memoryview(body(LARGE)))
    writing.wait(part.written)
    part.abandon()
    writing.journal.cut(CheckpointId(1, 11, 101))
    writing.entry(102)
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [2]
    assert [entry.seq for entry in read_journal(writing.journal.directory).entries] == [101, 102]
