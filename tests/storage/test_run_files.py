"""Run files and last epochs, and the removal of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpointed import shard, with_checksum, write
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import Storage
from freestep_service.storage.run_files import LastEpochs, RunFile


def test_removing_a_run_removes_all_of_its_files_and_no_others(storage: Storage) -> None:
    for run in ("run", "run-2"):
        RunFile("{}", 3, 2).write(storage, run)
        checkpoints = Checkpoints(storage, run, keep=1)
        write(checkpoints, shard().copy_state(), 2)
        checkpoints.mark_closed(0, 37, 1, 0)
    Checkpoints(storage, "run", keep=1).remove(3)
    assert storage.names("runs") == ["run-2"]
    assert storage.names("runs/run") == []
    assert [each.step for each in checkpoints.all()] == [0]


@pytest.mark.parametrize("has_file", [True, False])
def test_removing_a_run_leaves_a_later_run_of_its_name(storage: Storage, has_file: bool) -> None:
    """Its run file, or as much as its first checkpoint."""
    earlier, later = replace(shard().copy_state(), epoch=3), replace(shard().copy_state(), epoch=4)
    checkpoints = Checkpoints(storage, "run", keep=2)
    for copy in (earlier, later):
        write(checkpoints, copy, 2)
    if has_file:
        RunFile("{}", 4, 2).write(storage, "run")
    checkpoints.remove(3)
    assert [each.epoch for each in checkpoints.all()] == [4]
    assert has_file == ("run.json" in storage.names("runs/run"))
    checkpoints.remove(4)
    assert storage.names("runs") == []


@pytest.mark.parametrize("text", [b"no document", with_checksum({"format": 9, "epoch": 1})])
def test_removing_a_run_leaves_no_damaged_file_and_one_of_a_newer_version(storage: Storage, text: bytes) -> None:
    storage.write("runs/run/run.json", [text])
    Checkpoints(storage, "run", keep=1).remove(3)
    assert storage.names("runs") == ([] if text == b"no document" else ["run"])


def test_a_run_file_is_read_back(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        RunFile.read(storage, "run")
    RunFile("{}", 3, 17).write(storage, "run")
    assert RunFile.read(storage, "run") == RunFile("{}", 3, 17)
    for text in (b"", b"[1]", b"\xff", b"[" * 100_000, b'{"spec": "{}", "epoch": "3", "shards": 1}', b'{"spec": "{}"}'):
        storage.write("runs/run/run.json", [text])
        with pytest.raises(Damaged, match=r"run.json is no run file"):
            RunFile.read(storage, "run")


def test_a_run_file_of_an_older_version_is_read(storage: Storage) -> None:
    storage.write("runs/run/run.json", [b'{"spec": "{}", "epoch": 3, "shards": 17}'])
    assert RunFile.read(storage, "run") == RunFile("{}", 3, 17)
    for number in (0, 1_000_000_000):
        storage.write("runs/run/run.json", [b'{"spec": "{}", "epoch": 3, "shards": %d}' % number])
        with pytest.raises(Damaged, match="shards"):
            RunFile.read(storage, "run")


def test_any_bit_of_a_run_file_that_flips_is_noticed(storage: Storage) -> None:
    written = RunFile('{"lr": 1}', 3, 2, 1, "id", "creator")
    written.write(storage, "run")
    text = storage.read("runs/run/run.json")
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        storage.write("runs/run/run.json", [bytes(flipped)])
        try:
            # A bit of white space may say the same.
            assert RunFile.read(storage, "run") == written
        except Damaged:
            continue


@pytest.mark.parametrize("damage", [b"", b'{"spec": "{}", "epoch": 3, "shards": 1, "checksum": "0"}'])
def test_a_damaged_run_file_is_made_anew_from_a_checkpoint(
    storage: Storage, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    written = RunFile('{"lr": 1}', 1, 2, 1, "id", "creator")
    written.write(storage, "run")
    checkpoints = Checkpoints(storage, "run", keep=1)
    write(checkpoints, shard().copy_state(), 2)
    storage.write("runs/run/run.json", [damage])
    assert RunFile.read(storage, "run") == written
    assert "run.json is no run file" in caplog.text
    assert "made anew from the copy in the checkpoint" in caplog.text
    caplog.clear()
    assert RunFile.read(storage, "run") == written
    assert caplog.text == ""


def test_the_last_epoch_of_a_deleted_run_is_read_back(storage: Storage) -> None:
    epochs = LastEpochs(storage)
    assert epochs.read("run") == 0
    epochs.note("run", 3)
    epochs.note("other", 5)
    epochs.note("run", 2)
    assert (epochs.read("run"), epochs.read("other")) == (3, 5)
    for text in (b"", b"three", b"\xff", b"3.5"):
        storage.write("deleted/run", [text])
        with pytest.raises(Damaged, match="deleted/run holds no epoch"):
            epochs.read("run")


def test_of_many_deleted_runs_the_largest_epoch_is_kept(storage: Storage) -> None:
    epochs = LastEpochs(storage, kept=3)
    RunFile("{}", 3, 2).write(storage, "left")
    for number, run in enumerate(["a", "left", "b"]):
        epochs.note(run, 10 - number)
    assert epochs.read_forgotten() == 0
    epochs.note("c", 2)
    # What the deletion of a run has left behind is still known to be of one that was deleted.
    assert storage.names("deleted") == ["c", "left"]
    assert [epochs.read(run) for run in ("a", "b", "c", "left")] == [0, 0, 2, 9]
    assert epochs.read_forgotten() == 10
    for run in ("a", "d"):
        epochs.note(run, 1)
    assert (epochs.read("a"), epochs.read_forgotten()) == (0, 10)
