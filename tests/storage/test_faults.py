"""A medium that fails at every operation in turn: nothing half-written looks whole, and what was there stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import get_args

import pytest
import torch

from checkpointed import RECORD, advance, bounds, files, flip_a_bit, part_of, shard, write
from freestep.errors import StorageUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.media import LocalStorage, Storage
from freestep_service.storage.run_files import LastEpochs, RunFile
from storage.faulty import Fault, FaultyStorage, When

Faults = Callable[[Callable[[FaultyStorage], object]], Iterator[tuple[LocalStorage, bool]]]


@pytest.fixture(params=get_args(When))
def when(request: pytest.FixtureRequest) -> When:
    """When an operation fails, as seen from its effect."""
    value: When = request.param
    return value


@pytest.fixture(params=[True, False], ids=["one", "all"])
def faults(request: pytest.FixtureRequest, tmp_path: Path, when: When, caplog: pytest.LogCaptureFixture) -> Faults:
    """Carries an action out on copies of what is in `before`, each with a fault one operation later, until none occurs.

    Gives the directory that it has left behind, which works again, and whether the action was refused.
    """

    def carry_out(action: Callable[[FaultyStorage], object]) -> Iterator[tuple[LocalStorage, bool]]:
        for at in count():
            root = tmp_path / str(at)
            shutil.copytree(tmp_path / "before", root)
            faulty = FaultyStorage(root, Fault(at, when, request.param))
            try:
                action(faulty)
                is_refused = False
            except StorageUnavailable as error:
                assert str(error).startswith("the storage faulty cannot be ")
                is_refused = True
            if not faulty.has_failed:
                assert at > 0 and not is_refused
                return
            yield LocalStorage(root), is_refused
            assert "is damaged" not in caplog.text
            assert not [file for file in root.rglob(".*") if file.name != ".writable"]

    return carry_out


@pytest.fixture
def before(tmp_path: Path) -> LocalStorage:
    """What is in storage before an action."""
    return LocalStorage(tmp_path / "before")


def copies(number: int) -> list[StateCopy]:
    made = shard()
    found = []
    for _ in range(number):
        advance(made, 1)
        found.append(made.copy_state())
    return found


def assert_whole(storage: Storage, *expected: StateCopy) -> list[CheckpointId]:
    """The checkpoints that are offered, each of which is one of those expected, whole."""
    checkpoints = Checkpoints(storage, "run", keep=1)
    offers = checkpoints.offers(0, 37)
    for copy in expected:
        if id_of(copy) in offers:
            loaded = checkpoints.load(id_of(copy), 0, 37)
            assert loaded.receipts == {"key": RECORD}
            assert all(torch.equal(loaded.state.tensors[name], copy.tensors[name]) for name in copy.tensors)
    assert set(offers) <= {id_of(copy) for copy in expected}
    return offers


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(before: LocalStorage, faults: Faults) -> None:
    old, new = copies(2)
    write(Checkpoints(before, "run", keep=1), old, 2, {"key": RECORD})

    def write_new(storage: Storage) -> None:
        write(Checkpoints(storage, "run", keep=1), new, 2, {"key": RECORD})

    for storage, is_refused in faults(write_new):
        offers = assert_whole(storage, old, new)
        assert offers
        if is_refused:
            assert id_of(old) in offers
        else:
            assert id_of(new) in offers
        write_new(storage)
        assert assert_whole(storage, new) == [id_of(new)]
        assert len(storage.names(f"runs/run/checkpoints/{new.epoch:08d}-{new.step:012d}-{new.seq:012d}")) == 5


def test_a_damaged_part_that_cannot_be_written_anew_is_no_whole_one(
    before: LocalStorage, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = copies(2)
    begin, end = bounds(2)[0]
    for copy in (old, new):
        write(Checkpoints(before, "run", keep=2), copy, 2, {"key": RECORD})
    flip_a_bit(files(tmp_path / "before", ".safetensors")[0])

    def repair(storage: Storage) -> None:
        Checkpoints(storage, "run", keep=2).write(part_of(new, begin, end), begin, end, 37, {"key": RECORD})

    for storage, is_refused in faults(repair):
        offers = Checkpoints(storage, "run", keep=2).offers(0, 37)
        assert id_of(old) in offers
        if is_refused and id_of(new) in offers:
            # Either the damaged one is still there, or its successor was written before the medium failed.
            checkpoints = Checkpoints(storage, "run", keep=2)
            try:
                loaded = checkpoints.load(id_of(new), 0, 37).state
            except ValueError:
                assert checkpoints.offers(0, 37) == [id_of(old)]
                caplog.clear()
            else:
                assert all(torch.equal(loaded.tensors[name], new.tensors[name]) for name in new.tensors)
        repair(storage)
        assert assert_whole(storage, old, new) == [id_of(old), id_of(new)]


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(before: LocalStorage, faults: Faults) -> None:
    (copy,) = copies(1)
    write(Checkpoints(before, "run", keep=1), copy, 2, {"key": RECORD})
    used: list[tuple[FaultyStorage, Checkpoints]] = []

    def load(storage: FaultyStorage) -> None:
        used.append((storage, Checkpoints(storage, "run", keep=1)))
        used[-1][1].load(id_of(copy), 0, 37)

    for _, is_refused in faults(load):
        assert is_refused
        faulty, checkpoints = used[-1]
        faulty.repair()
        assert checkpoints.offers(0, 37) == [id_of(copy)]
        assert checkpoints.load(id_of(copy), 0, 37).receipts == {"key": RECORD}


def test_an_older_checkpoint_is_not_offered_for_a_newer_one_that_cannot_be_read(
    before: LocalStorage, faults: Faults
) -> None:
    old, new = copies(2)
    for copy in (old, new):
        write(Checkpoints(before, "run", keep=2), copy, 1, {"key": RECORD})
    found: list[list[CheckpointId]] = []
    for _, is_refused in faults(lambda storage: found.append(Checkpoints(storage, "run", keep=2).offers(0, 37))):
        assert is_refused or found[-1] == [id_of(new)]
    assert found[-1] == [id_of(old), id_of(new)]


def test_a_run_that_cannot_be_removed_has_whole_checkpoints_or_none(before: LocalStorage, faults: Faults) -> None:
    (copy,) = copies(1)
    checkpoints = Checkpoints(before, "run", keep=1)
    write(checkpoints, copy, 2, {"key": RECORD})
    checkpoints.mark_closed(0, 37, 1, 1)
    RunFile("{}", 1, 2).write(before, "run")
    RunFile("{}", 1, 1).write(before, "other")
    for storage, is_refused in faults(lambda storage: Checkpoints(storage, "run", keep=1).remove(1)):
        assert_whole(storage, copy)
        # It does without the run file where that cannot be read.
        assert is_refused or storage.names("runs") == ["other"]
        Checkpoints(storage, "run", keep=1).remove(1)
        assert storage.names("runs") == ["other"]


def test_a_run_file_is_the_old_one_or_the_new_one(before: LocalStorage, faults: Faults, when: When) -> None:
    old, new = RunFile("{}", 1, 2), RunFile('{"spec": 1}', 2, 3)
    old.write(before, "run")
    for storage, is_refused in faults(lambda storage: new.write(storage, "run")):
        assert is_refused
        assert RunFile.read(storage, "run") == (new if when == "after" else old)


def test_a_last_epoch_is_the_old_one_or_the_new_one(before: LocalStorage, faults: Faults, when: When) -> None:
    LastEpochs(before).note("run", 10)
    for storage, is_refused in faults(lambda storage: LastEpochs(storage).note("run", 11)):
        # Where it is not refused, older ones are forgotten with the next.
        assert LastEpochs(storage).read("run") == (11 if when == "after" or not is_refused else 10)


def test_where_a_shard_was_left_is_recorded_or_not(before: LocalStorage, faults: Faults, when: When) -> None:
    def mark(storage: Storage) -> None:
        Checkpoints(storage, "run", keep=1).mark_closed(0, 37, 2, 5)

    Checkpoints(before, "run", keep=1).mark_closed(0, 37, 1, 4)
    for storage, is_refused in faults(mark):
        assert is_refused
        assert Checkpoints(storage, "run", keep=1).closed(0, 37) == ((2, 5) if when == "after" else (1, 4))


def test_where_a_shard_was_left_is_read_or_not_known(before: LocalStorage, faults: Faults) -> None:
    Checkpoints(before, "run", keep=1).mark_closed(0, 37, 1, 4)
    for _, is_refused in faults(lambda storage: Checkpoints(storage, "run", keep=1).closed(0, 37)):
        assert is_refused


def test_a_medium_that_cannot_be_written_is_found_out_beforehand(before: LocalStorage, faults: Faults) -> None:
    before.write("file", [b"x"])
    for storage, _ in faults(Storage.require_writable):
        assert storage.names("") == ["file"]
        storage.require_writable()
