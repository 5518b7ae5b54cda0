"""A shard's journal on a real disk: what was told to be on it is read back, and only what is needed is kept."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import xxhash

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.records import CheckpointId, LogPosition
from freestep_service.storage import journal_parts, journal_thread
from freestep_service.storage.journal_files import remove_journals, remove_other_journals, segment_paths
from freestep_service.storage.journal_format import Kind
from freestep_service.storage.journal_reader import read_journal
from storage.journals import BASE, LARGE, Writing, body, claim, frame_places, last_segment


@pytest.mark.parametrize("length", [0, 1, 1000, LARGE])
def test_entries_and_bodies_come_back(writing: Writing, length: int) -> None:
    writing.begin()
    for number in range(3):
        writing.push(f"key-{number}", body(length, number))
        writing.entry(101 + number, f"key-{number}", record="{}")
    writing.entry(104, measured={"name": "loss"})
    contents = read_journal(writing.journal.directory)
    assert (contents.epoch, contents.base, contents.run_id, contents.parts) == (1, BASE, "id", {})
    assert [entry.seq for entry in contents.entries] == [101, 102, 103, 104]
    for number, entry in enumerate(contents.entries[:3]):
        assert entry.part is not None
        assert entry.part.claim == claim(f"key-{number}")
        assert b"".join(entry.part.read()) == body(length, number)
        assert entry.members["record"] == "{}"
    assert contents.entries[3].part is None
    assert contents.follows(BASE)
    assert contents.follows(CheckpointId(1, 11, 102))
    assert not contents.follows(CheckpointId(1, 9, 99))
    assert not contents.follows(CheckpointId(2, 11, 102))


def test_a_push_that_is_not_decided_is_kept_until_the_shard_goes_on(writing: Writing) -> None:
    writing.begin()
    for key in ("small", "decided", "refused"):
        writing.push(key, body())
    writing.push("large", body(LARGE))
    writing.entry(101, "decided")
    writing.journal.forget("refused")
    assert set(read_journal(writing.journal.directory).parts) == {"small", "large", "refused"}
    assert writing.journal.find("refused") is None
    part = writing.journal.find("large")
    assert part is not None and b"".join(part.read()) == body(LARGE)
    writing.journal.back_to(101)
    assert writing.journal.find("small") is writing.journal.find("large") is None


def test_bodies_that_come_at_the_same_time_do_not_mix(writing: Writing) -> None:
    writing.begin()
    bodies = {f"key-{number}": body(LARGE, number) for number in range(3)}
    parts = {key: writing.part(key, len(data)) for key, data in bodies.items()}
    for begin in range(0, LARGE, 50_000):
        for key, part in parts.items():
            part.write(memoryview(bodies[key])[begin : begin + 50_000])
    for key, part in parts.items():
        writing.wait(lambda done, part=part: part.written(done) and done(None))
        part.finish(xxhash.xxh3_128_hexdigest(bodies[key]))
    writing.flush()
    found = read_journal(writing.journal.directory).parts
    assert {key: b"".join(part.read()) for key, part in found.items()} == bodies


@pytest.mark.parametrize(("length", "piece"), [(5000, 2), (LARGE, 500)])
def test_a_body_may_drip_in(writing: Writing, length: int, piece: int) -> None:
    writing.begin()
    # The system takes 1024 buffers at a time.
    writing.push("drips", body(length), piece)
    writing.entry(101, "drips")
    (entry,) = read_journal(writing.journal.directory).entries
    assert entry.part is not None and b"".join(entry.part.read()) == body(length)


def test_a_body_that_broke_off_is_no_part(writing: Writing) -> None:
    writing.begin()
    part = writing.part("broken", LARGE)
    part.write(memoryview(body(100)))
    part.abandon()
    writing.push("whole", body())
    writing.entry(101, "whole")
    contents = read_journal(writing.journal.directory)
    assert [entry.seq for entry in contents.entries] == [101]
    assert contents.parts == {}


def test_entries_behind_which_the_shard_went_on_are_void(writing: Writing) -> None:
    writing.begin()
    for seq in (101, 102, 103):
        writing.entry(seq, mark=seq)
    writing.journal.back_to(101)
    writing.entry(102, mark="second")
    assert [entry.members["mark"] for entry in read_journal(writing.journal.directory).entries] == [101, "second"]


def test_an_epoch_begins_anew(writing: Writing) -> None:
    writing.begin()
    writing.push("old", body())
    writing.entry(101, "old")
    writing.push("undecided", body())
    later = CheckpointId(1, 8, 90)
    writing.begin(2, later, 90)
    writing.entry(91, epoch=2)
    contents = read_journal(writing.journal.directory)
    assert (contents.epoch, contents.base, contents.parts) == (2, later, {})
    assert [entry.seq for entry in contents.entries] == [91]


def test_it_is_cut_behind_a_checkpoint_but_not_what_is_still_needed(writing: Writing) -> None:
    writing.begin()
    for seq in (101, 102):
        writing.push(f"key-{seq}", body())
        writing.entry(seq, f"key-{seq}")
    writing.push("late", body())
    writing.journal.next_segment()
    writing.entry(103, "late")
    writing.journal.cut(CheckpointId(1, 12, 102))
    writing.flush()
    # The body of entry 103 is in the first segment.
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [1, 2]
    writing.journal.next_segment()
    writing.entry(104)
    writing.journal.cut(CheckpointId(2, 13, 103))
    writing.flush()
    assert len(segment_paths(writing.journal.directory)) == 3
    writing.journal.cut(CheckpointId(1, 13, 103))
    writing.flush()
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [3]
    contents = read_journal(writing.journal.directory)
    assert [entry.seq for entry in contents.entries] == [104]
    assert contents.follows(CheckpointId(1, 13, 103))


def test_what_a_checkpoint_has_left_brings_no_other_forward(writing: Writing) -> None:
    journal, content = writing.journal, body(100_000)
    writing.begin()
    writing.push("waits", content)
    writing.push_all(range(101, 111), content)
    written = journal.size
    assert journal.since_checkpoint == written > 11 * len(content)
    journal.next_segment()
    # Of what the coming one covers, nothing is dropped yet.
    assert journal.since_checkpoint >= written
    writing.push_all(range(111, 113), content)
    journal.cut(CheckpointId(1, 20, 110))
    assert journal.size > written
    assert 2 * len(content) < journal.since_checkpoint < 3 * len(content)
    writing.entry(113, "waits")
    journal.next_segment()
    journal.cut(CheckpointId(1, 23, 113))
    assert journal.since_checkpoint == journal.size < len(content)
    writing.push("waits again", content)
    journal.next_segment()
    journal.cut(CheckpointId(1, 24, 114))
    assert journal.since_checkpoint < len(content) < journal.size
    writing.begin(2, None, 0)
    assert journal.since_checkpoint == journal.size


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


def test_entries_whose_pushes_were_cut_away_are_in_the_checkpoint(writing: Writing) -> None:
    writing.begin()
    writing.push("late", body())
    writing.push("later", body())
    writing.journal.next_segment()
    writing.entry(101, "late")
    writing.push("own", body())
    writing.entry(102, "own")
    writing.entry(103, "later")
    writing.push("open", body())
    writing.journal.next_segment()
    writing.entry(104)
    writing.journal.cut(CheckpointId(1, 13, 103))
    writing.entry(105, "open")
    # The second one has the body of entry 105.
    assert [number for number, _ in segment_paths(writing.journal.directory)] == [2, 3]
    contents = read_journal(writing.journal.directory)
    assert [entry.seq for entry in contents.entries] == [104, 105]
    assert contents.follows(CheckpointId(1, 13, 103))
    assert not contents.follows(CheckpointId(1, 12, 102))


def test_a_journal_that_was_cut_does_not_follow_an_older_checkpoint(writing: Writing) -> None:
    writing.begin()
    for seq in (101, 102, 103):
        writing.push(f"key-{seq}", body())
        writing.entry(seq, f"key-{seq}")
    writing.journal.next_segment()
    writing.journal.cut(CheckpointId(1, 13, 103))
    writing.flush()
    contents = read_journal(writing.journal.directory)
    assert contents.entries == []
    assert contents.follows(CheckpointId(1, 13, 103))
    # Should the newest checkpoint be damaged, what was acknowledged since the one before it is nowhere.
    assert not contents.follows(CheckpointId(1, 11, 101))
    assert not contents.follows(BASE)


def test_what_comes_after_its_end_is_told_of(writing: Writing) -> None:
    writing.begin()
    part = writing.journal.part(claim("late"), LARGE)
    part.write(memoryview(body(LARGE)))
    writing.journal.close()
    for act in (part.written, writing.journal.flush, lambda done: writing.journal.make_room(LARGE, done)):
        with pytest.raises(ShardUnavailable):
            writing.wait(act)


def test_its_space_is_given_back(writing: Writing) -> None:
    writing.begin()
    for _ in range(50):
        writing.wait(lambda done: writing.journal.make_room(100_000, done) and done(None))
        writing.journal.part(claim("left"), 100_000).abandon()
    writing.entry(101)
    path = last_segment(writing)
    assert path.stat().st_size < 4 * 1024**2
    writing.journal.next_segment()
    writing.flush()
    assert path.stat().st_size == frame_places(path, Kind.ENTRY)[-1].end


def test_journals_of_another_number_of_shards_are_removed_unless_they_are_newer(writing: Writing) -> None:
    writing.begin(3, None, 0)
    writing.flush()
    directory = writing.journal.directory
    remove_other_journals(directory.parent, [directory.name], 4)
    remove_other_journals(directory.parent, [], 3)
    assert read_journal(directory).epoch == 3
    remove_other_journals(directory.parent, [], 4)
    assert not directory.exists()


def test_what_is_no_journal_of_a_shard_is_left_where_journals_are_removed(
    writing: Writing, caplog: pytest.LogCaptureFixture
) -> None:
    run = writing.journal.directory.parent
    writing.begin()
    writing.flush()
    copy = Path(shutil.copytree(writing.journal.directory, run / f"{writing.journal.directory.name}.copy"))
    (run / "notes.txt").write_text("mine")
    damaged = Path(shutil.copytree(copy, run / "000000000000008-000000000000016"))
    (damaged / "owner").write_text("broken")
    (run / "000000000000016-000000000000024").symlink_to(copy)
    remove_other_journals(run, [], 9)
    assert not writing.journal.directory.exists()
    # It would hold up the run that it is no part of any more.
    assert f"{damaged} is not removed, though the run has other shards now" in caplog.text
    remove_journals(run, 9, damaged=False)
    assert f"{damaged} is not removed, though its run is deleted" in caplog.text
    remove_journals(run, 9, damaged=True)
    assert not damaged.exists()
    assert (run / "notes.txt").read_text() == "mine"
    assert [path for _, path in segment_paths(copy)] and read_journal(copy).epoch == 1


def test_the_journals_of_a_run_are_removed(writing: Writing) -> None:
    writing.begin()
    writing.flush()
    # It is of a later run of the name.
    remove_journals(writing.journal.directory.parent, 0, damaged=True)
    assert read_journal(writing.journal.directory).epoch == 1
    remove_journals(writing.journal.directory.parent, 1, damaged=True)
    assert not os.path.lexists(writing.journal.directory)
    assert read_journal(writing.journal.directory).epoch == 0
