"""Format 2 of checkpoints: the files in `format_2`, of an earlier version, are read, and are written alike today."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpointed import RECORD, advance, bounds, files, part_of, shard
from freestep_service.domain.records import CheckpointId
from freestep_service.domain.reports import Measured
from freestep_service.state.shard import Entry, StateCopy
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.media import LocalStorage
from freestep_service.storage.run_files import LastEpochs, RunFile

KEPT = Path(__file__).parent / "format_2"
TIMES = ("created_at", "completed_at", "checksum")


def state() -> StateCopy:
    """What was written: two updates of four pushes, two pushes gathered since, and a report.

    The vectors are those of the files: other processors have other random numbers. That version kept no learning rate.
    """
    made = shard(aggregation={"policy": "buffered", "batch": 4})
    advance(made, 10, 4)
    made.apply(Entry(11, 1, advance=False, measured=Measured("loss", 2, 0.5)))
    first, second = map(safetensors.torch.load_file, files(KEPT, ".safetensors"))
    copy = made.copy_state()
    assert first.keys() == copy.tensors.keys()
    scalars = {
        group: {name: value for name, value in each.items() if name != "scheduled_lr"}
        for group, each in copy.scalars.items()
    }
    tensors = {name: torch.cat([first[name], second[name]]) for name in copy.tensors}
    return dataclasses.replace(copy, tensors=tensors, scalars=scalars)


def test_what_an_earlier_version_wrote_is_read(caplog: pytest.LogCaptureFixture) -> None:
    storage, expected = LocalStorage(KEPT), state()
    checkpoints = Checkpoints(storage, "run", keep=1)
    assert checkpoints.offers(0, 37) == [CheckpointId(1, 2, 11)]
    assert [each.step for each in checkpoints.all()] == [2]
    for begin, end in [(0, 37), *bounds(3)]:
        loaded = checkpoints.load(CheckpointId(1, 2, 11), begin, end)
        assert loaded.receipts == {"key": RECORD}
        assert loaded.state.tensors.keys() == expected.tensors.keys()
        for name, tensor in loaded.state.tensors.items():
            assert torch.equal(tensor, expected.tensors[name][begin:end])
        assert {**vars(loaded.state), "tensors": None} == {**vars(expected), "tensors": None}
    assert checkpoints.closed(0, 37) == (1, 11)
    assert RunFile.read(storage, "run") == RunFile("{}", 1, 2)
    assert LastEpochs(storage).read("other") == 7
    assert caplog.text == ""


def test_the_same_is_written_today(tmp_path: Path) -> None:
    storage, copy = LocalStorage(tmp_path), state()
    checkpoints = Checkpoints(storage, "run", keep=1)
    for begin, end in bounds(2):
        checkpoints.write(part_of(copy, begin, end), begin, end, 37, {"key": RECORD})
    checkpoints.complete(id_of(copy))
    checkpoints.mark_closed(0, 37, 1, 11)
    RunFile("{}", 1, 2).write(storage, "run")
    LastEpochs(storage).note("other", 7)
    today, earlier = contents(tmp_path), contents(KEPT)
    # Earlier versions did not seal it.
    sealed, plain = today.pop("runs/run/run.json"), earlier.pop("runs/run/run.json")
    assert isinstance(sealed, list)
    assert [pair for pair in sealed if pair[0] not in ("format", "checksum")] == plain
    assert today == earlier


def contents(root: Path) -> dict[str, object]:
    """What is in each file, but for the time at which it was written."""
    return {str(file.relative_to(root)): content(file) for file in root.rglob("*") if file.is_file()}


def content(file: Path) -> object:
    if file.suffix != ".json":
        return file.read_bytes()
    # Pairs, in their order.
    document = json.loads(file.read_bytes(), object_pairs_hook=list)
    return [pair for pair in document if pair[0] not in TIMES]
