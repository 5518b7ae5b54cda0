"""Files of runs beside their checkpoints; nothing is left of a run that was removed."""

from __future__ import annotations

import pytest

from checkpointed import shard, write
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.media import Storage
from freestep_service.storage.run_files import LastEpochs, RunFile


def test_nothing_is_left_of_a_run_that_was_removed_and_all_of_the_others(storage: Storage) -> None:
    for run in ("run", "run-2"):
        RunFile("{}", 3, 2).write(storage, run)
        checkpoints = Checkpoints(storage, run, keep=1)
        write(checkpoints, shard().copy_state(), 2)
        checkpoints.mark_closed(0, 37, 1, 0)
    Checkpoints(storage, "run", keep=1).remove()
    assert storage.names("runs") == ["run-2"]
    assert storage.names("runs/run") == []
    assert [each.step for each in checkpoints.all()] == [0]


def test_a_run_file_is_read_back(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        RunFile.read(storage, "run")
    RunFile("{}", 3, 17).write(storage, "run")
    assert RunFile.read(storage, "run") == RunFile("{}", 3, 17)
    for text in (b"", b"[1]", b"\xff", b"[" * 100_000, b'{"spec": "{}", "epoch": "3", "shards": 1}', b'{"spec": "{}"}'):
        storage.write("runs/run/run.json", [text])
        with pytest.raises(ValueError, match="RunFile"):
            RunFile.read(storage, "run")


def test_the_last_epoch_of_a_deleted_run_is_read_back(storage: Storage) -> None:
    epochs = LastEpochs(storage)
    assert epochs.read("run") == 0
    epochs.write("run", 3)
    epochs.write("other", 5)
    assert (epochs.read("run"), epochs.read("other")) == (3, 5)
