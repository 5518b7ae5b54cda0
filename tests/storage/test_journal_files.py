"""Which journals of a run are removed: those of other shards or of a deleted run, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from freestep_service.storage.journal_files import remove_journals, remove_other_journals, segment_paths
from freestep_service.storage.journal_reader import read_journal
from storage.journals import Writing


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
