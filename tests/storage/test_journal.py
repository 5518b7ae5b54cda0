"""A shard's journal on a real disk: what was told to be on it is read back, whatever was cut, broken or taken over."""

from __future__ import annotations

import errno
import os
import queue
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import xxhash

from freestep.errors import StorageUnavailable
from freestep_service.domain.records import CheckpointId, Claim, Fenced
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal import Journal
from freestep_service.storage.journal_files import frames, remove_journals, remove_other_journals, segment_paths
from freestep_service.storage.journal_format import Frame, Kind
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_repair import discard, repair, rows
from freestep_service.storage.journal_rewrite import write_again
from freestep_service.storage.journal_thread import Work
from losing_disk import LosingDisk
from meanwhile import DEADLINE_S
from small_disk import small_disk

BASE = CheckpointId(1, 10, 100)
LARGE = 3 * 1024**2 + 17


class Writing:
    """A journal, and the thread that waits for it."""

    def __init__(self, directory: Path) -> None:
        self._told: queue.Queue[Callable[[], None]] = queue.Queue()
        self.journal = Journal(directory, "run", "id", self._told.put)
        self.journal.take_over()

    def wait(self, act: Callable[[Callable[[Exception | None], None]], object]) -> None:
        """Has something done, and raises what it failed with."""
        outcomes: list[Exception | None] = []
        act(outcomes.append)
        while not outcomes:
            self._told.get(timeout=DEADLINE_S)()
        if outcomes[0] is not None:
            raise outcomes[0]

    def begin(self, epoch: int = 1, base: CheckpointId | None = BASE, seq: int = 100) -> None:
        self.wait(lambda done: self.journal.begin(epoch, base, seq, done))

    def push(self, key: str, body: bytes) -> None:
        """Writes a body as if it came in pieces."""
        outcomes: list[Exception | None] = []
        if not self.journal.make_room(len(body), outcomes.append):
            while not outcomes:
                self._told.get(timeout=DEADLINE_S)()
            if outcomes[0] is not None:
                raise outcomes[0]
        part = self.journal.part(claim(key), len(body))
        for begin in range(0, len(body), 100_000):
            part.write(memoryview(body)[begin : begin + 100_000])
        told: list[Exception | None] = []
        if not part.written(told.append):
            while not told:
                self._told.get(timeout=DEADLINE_S)()
        part.finish(xxhash.xxh3_128_hexdigest(body))

    def entry(self, seq: int, key: str | None = None, epoch: int = 1, **more: Any) -> None:
        members = {"epoch": epoch, "seq": seq, **more}
        if key is not None:
            members |= {"key": key, "counts": True}
        self.wait(lambda done: self.journal.entry(members, done))

    def flush(self) -> None:
        self.wait(self.journal.flush)


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Writing]:
    made = Writing(tmp_path / "run" / "000000000000000-000000000000008")
    yield made
    made.journal.close()


def claim(key: str) -> Claim:
    return Claim("lease", 1, 5, key, samples=2.0, loss=0.5)


def body(length: int = 1000, seed: int = 0) -> bytes:
    return bytes((seed + index) % 251 for index in range(length))


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
    for _ in bodies:
        writing.wait(lambda done: writing.journal.make_room(LARGE, done) and done(None))
    parts = {key: writing.journal.part(claim(key), len(data)) for key, data in bodies.items()}
    for begin in range(0, LARGE, 50_000):
        for key, part in parts.items():
            part.write(memoryview(bodies[key])[begin : begin + 50_000])
    for key, part in parts.items():
        writing.wait(lambda done, part=part: part.written(done) and done(None))
        part.finish(xxhash.xxh3_128_hexdigest(bodies[key]))
    writing.flush()
    found = read_journal(writing.journal.directory).parts
    assert {key: b"".join(part.read()) for key, part in found.items()} == bodies


def test_a_body_that_broke_off_is_no_part(writing: Writing) -> None:
    writing.begin()
    writing.wait(lambda done: writing.journal.make_room(LARGE, done) and done(None))
    part = writing.journal.part(claim("broken"), LARGE)
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


def last_segment(writing: Writing) -> Path:
    return segment_paths(writing.journal.directory)[-1][1]


def frame_places(path: Path, kind: Kind) -> list[Frame]:
    return [frame for frame in frames(path) if isinstance(frame, Frame) and frame.kind == kind]


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


def test_a_full_disk_refuses_a_push_before_it_comes(writing: Writing) -> None:
    writing.begin()
    writing.push("one", body())
    writing.entry(101, "one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may be no longer: as a full disk, with an error instead of a signal.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024**2, before[1]))
    try:
        with pytest.raises(StorageUnavailable, match="cannot be written: File too large"):
            writing.push("too large", body(9 * 1024**2))
        writing.push("fits", body())
        writing.entry(102, "fits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    writing.push("too large", body(9 * 1024**2))
    writing.entry(103, "too large")
    assert [entry.seq for entry in read_journal(writing.journal.directory).entries] == [101, 102, 103]


def test_near_the_end_of_a_disk_journals_leave_room_for_each_other(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=3072) as disk, ExitStack() as stack:
        journals = [Writing(disk / name) for name in ("first", "second", "third", "fourth")]
        for each in journals:
            stack.callback(each.journal.close)
            each.begin()
            before = shutil.disk_usage(disk).free
            each.push("one", body())
            # What the push needs with its margin, and a fourth of what is left.
            assert before - shutil.disk_usage(disk).free <= 300 * 1024 + before // 4
        for each in journals:
            each.push("two", body())
            each.entry(101, "two")


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
    remove_journals(run)
    assert not damaged.exists()
    assert (run / "notes.txt").read_text() == "mine"
    assert [path for _, path in segment_paths(copy)] and read_journal(copy).epoch == 1


def test_the_journals_of_a_run_are_removed(writing: Writing) -> None:
    writing.begin()
    writing.flush()
    remove_journals(writing.journal.directory.parent)
    assert not os.path.lexists(writing.journal.directory)
    assert read_journal(writing.journal.directory).epoch == 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> LosingDisk:
    return LosingDisk(monkeypatch)


def test_after_a_failed_flush_nothing_is_told_to_be_on_disk_until_an_epoch_begins(
    writing: Writing, disk: LosingDisk
) -> None:
    writing.begin()
    writing.entry(101)
    disk.failures = 1
    with pytest.raises(StorageUnavailable, match="Input/output error"):
        writing.entry(102)
    # The disk would take it now, and says nothing of what it has lost.
    for act in (writing.flush, lambda: writing.entry(103)):
        with pytest.raises(StorageUnavailable, match="Input/output error"):
            act()
    writing.begin(2, BASE, 100)
    writing.entry(101, epoch=2)


def test_what_waits_beside_the_beginning_of_an_epoch_is_told_of_the_failure_before_it(
    writing: Writing, disk: LosingDisk
) -> None:
    writing.begin()
    writing.entry(101)
    outcomes: dict[str, Exception | None] = {}
    disk.failures = 1
    with disk.waiting():
        writing.journal.entry({"epoch": 1, "seq": 102}, lambda error: outcomes.update(first=error))
        disk.comes()
        # All of this is done at once.
        writing.journal.entry({"epoch": 1, "seq": 103}, lambda error: outcomes.update(entry=error))
        old = writing.journal._segments[-1]
        writing.journal.begin(2, BASE, 100, lambda error: outcomes.update(begin=error))
        writing.journal._thread.enqueue(Work(old, flush=True, done=lambda error: outcomes.update(late=error)))
    writing.flush()
    assert outcomes["begin"] is None
    assert all(isinstance(outcomes[each], StorageUnavailable) for each in ("first", "entry", "late"))


@pytest.mark.parametrize("length", [1000, LARGE])
def test_what_is_read_after_a_failed_flush_is_made_durable_before_it_counts(
    writing: Writing, disk: LosingDisk, tmp_path: Path, length: int
) -> None:
    writing.begin()
    writing.push("one", body(length))
    writing.entry(101, "one")
    writing.push("two", body(length, 1))
    disk.failures = 1
    with pytest.raises(StorageUnavailable):
        writing.entry(102, "two")
    directory = writing.journal.directory
    assert [entry.seq for entry in read_journal(disk.after_power_failed(directory, tmp_path / "before")).entries] == [
        101
    ]
    contents = read_journal(directory)
    assert [entry.seq for entry in contents.entries] == [101, 102]
    disk.failures = 1
    with pytest.raises(OSError, match="Input/output error"):
        write_again(contents)
    write_again(contents)
    kept = read_journal(disk.after_power_failed(directory, tmp_path / "after"))
    assert [entry.seq for entry in kept.entries] == [101, 102]
    for entry in kept.entries:
        assert entry.part is not None
        entry.part.check()


def test_a_body_that_came_behind_frames_that_were_made_durable_is_written_again(
    writing: Writing, disk: LosingDisk, tmp_path: Path
) -> None:
    writing.begin()
    data = body(LARGE)
    writing.wait(lambda done: writing.journal.make_room(LARGE, done) and done(None))
    part = writing.journal.part(claim("large"), LARGE)
    writing.entry(101)
    writing.entry(102)
    part.write(memoryview(data))
    writing.wait(lambda done: part.written(done) and done(None))
    part.finish(xxhash.xxh3_128_hexdigest(data))
    disk.failures = 1
    with pytest.raises(StorageUnavailable):
        writing.entry(103, "large")
    contents = read_journal(writing.journal.directory)
    write_again(contents)
    kept = read_journal(disk.after_power_failed(writing.journal.directory, tmp_path / "after"))
    assert [entry.seq for entry in kept.entries] == [101, 102, 103]
    last = kept.entries[-1].part
    assert last is not None and b"".join(last.read()) == data


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
