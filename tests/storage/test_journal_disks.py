"""Journals on disks that are full or fail: what was told to be on disk is there, and nothing else is told."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from freestep.errors import StorageUnavailable
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_rewrite import write_again
from freestep_service.storage.journal_thread import Work
from losing_disk import LosingDisk
from small_disk import small_disk
from storage.journals import BASE, LARGE, Writing, body


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


def test_no_byte_is_allocated_twice(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, ranges = os.posix_fallocate, []

    def record(descriptor: int, begin: int, length: int) -> None:
        ranges.append((begin, begin + length))
        allocate(descriptor, begin, length)

    monkeypatch.setattr(os, "posix_fallocate", record)
    writing.begin()
    for seq in range(101, 141):
        writing.push(str(seq), body(400_000))
        writing.entry(seq, str(seq))
    assert len(ranges) > 3
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


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
        old = writing.journal._segments.chain[-1]
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
    part = writing.part("large", LARGE)
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
