"""A shard's journal on a real disk: what was told to be on it is read back, and only what is needed is kept."""

from __future__ import annotations

import pytest
import xxhash

from freestep.errors import ShardUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.storage.journal_files import segment_paths
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


def test_checkpoints_that_are_not_written_leave_few_segments(writing: Writing) -> None:
    journal = writing.journal
    writing.begin()
    for seq in range(101, 201):
        writing.entry(seq)
        journal.next_segment()
        # As heartbeats tell of the newest one.
        journal.cut(BASE)
    writing.flush()
    assert len(segment_paths(journal.directory)) <= 20
    assert [entry.seq for entry in read_journal(journal.directory).entries] == [*range(101, 201)]
    # Once one is written, nothing of before is kept behind the next.
    journal.cut(CheckpointId(1, 20, 200))
    writing.entry(201)
    journal.next_segment()
    journal.cut(CheckpointId(1, 21, 201))
    writing.entry(202)
    assert len(segment_paths(journal.directory)) == 1
    contents = read_journal(journal.directory)
    assert [entry.seq for entry in contents.entries] == [202]
    assert contents.follows(CheckpointId(1, 21, 201))


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
