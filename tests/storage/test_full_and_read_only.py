"""A full disk, and a read-only one: what is to be written is refused, and what is there is read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpointed import RECORD, advance, bounds, part_of, shard, write
from freestep.errors import StorageUnavailable
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.media import LocalStorage
from freestep_service.storage.run_files import LastEpochs, RunFile
from small_disk import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with small_disk(tmp_path / "disk", kib=256) as place:
        yield place


def fill(disk: Path) -> Path:
    """A file that takes all room that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return ballast


def test_a_full_disk_is_read_and_refuses_what_is_to_be_written(disk: Path) -> None:
    storage, made = LocalStorage(disk), shard()
    checkpoints = Checkpoints(storage, "run", keep=1)
    old = made.copy_state()
    RunFile("{}", 1, 2).write(storage, "run")
    write(checkpoints, old, 2)
    advance(made, 1)
    storage.require_writable()
    ballast = fill(disk)
    before = sorted(disk.rglob("*"))
    refused: list[Callable[[], object]] = [
        storage.require_writable,
        lambda: write(checkpoints, made.copy_state(), 2),
        lambda: checkpoints.complete(id_of(made.copy_state())),
        lambda: checkpoints.mark_closed(0, 37, 1, 1),
        lambda: RunFile("{}", 2, 2).write(storage, "run"),
        lambda: LastEpochs(storage).note("run", 1),
    ]
    for call in refused:
        with pytest.raises(StorageUnavailable, match=f"the storage {disk} cannot be written: No space left on device"):
            call()
    assert [path for path in sorted(disk.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]
    assert checkpoints.offers(0, 37) == [id_of(old)]
    assert torch.equal(checkpoints.load(id_of(old), 0, 37).state.tensors["y"], old.tensors["y"])
    assert RunFile.read(storage, "run") == RunFile("{}", 1, 2)
    # What makes room is not refused.
    checkpoints.remove(1)
    ballast.unlink()
    storage.require_writable()
    assert [path for path in disk.rglob("*") if path.is_file()] == []


@pytest.fixture(params=["mounted", "forbidden"])
def make_read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Makes a directory, tmp_path / "disk", read-only."""
    disk = tmp_path / "disk"
    if request.param == "mounted":
        request.getfixturevalue("disk")
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True) and disk
        return
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    disk.mkdir()

    def forbid() -> Path:
        for each in [disk, *disk.rglob("*")]:
            each.chmod(each.stat().st_mode & ~0o222)
        return disk

    yield forbid
    for each in [disk, *disk.rglob("*")]:
        each.chmod(each.stat().st_mode | 0o200)


def test_a_read_only_disk_is_read(tmp_path: Path, make_read_only: Callable[[], Path]) -> None:
    storage, copy = LocalStorage(tmp_path / "disk"), shard().copy_state()
    checkpoints = Checkpoints(storage, "run", keep=1)
    RunFile("{}", 1, 2).write(storage, "run")
    LastEpochs(storage).note("gone", 3)
    write(checkpoints, copy, 2, {"key": RECORD})
    checkpoints.mark_closed(*bounds(2)[0], 1, 1)
    disk = make_read_only()
    assert storage.names("runs") == ["run"]
    assert RunFile.read(storage, "run") == RunFile("{}", 1, 2)
    assert (LastEpochs(storage).read("gone"), LastEpochs(storage).read("run")) == (3, 0)
    assert checkpoints.at(0) == id_of(copy)
    assert checkpoints.describe(id_of(copy)) == checkpoints.all()[0]
    for begin, end in bounds(2):
        assert checkpoints.offers(begin, end) == [id_of(copy)]
        loaded = checkpoints.load(id_of(copy), begin, end)
        assert loaded.receipts == {"key": RECORD}
        assert torch.equal(loaded.state.tensors["y"], copy.tensors["y"][begin:end])
    assert checkpoints.closed(*bounds(2)[0]) == (1, 1)
    # There is nothing to remove.
    checkpoints.clear_closed(*bounds(2)[1])
    refused: list[Callable[[], object]] = [
        storage.require_writable,
        lambda: checkpoints.clear_closed(*bounds(2)[0]),
        lambda: checkpoints.complete(id_of(copy)),
        lambda: checkpoints.remove(1),
    ]
    for call in refused:
        with pytest.raises(StorageUnavailable, match=f"the storage {disk} cannot be written: (Read-only|Permission)"):
            call()
    # A part that is there, and whole, is not written again.
    first = bounds(2)[0]
    assert checkpoints.write(part_of(copy, *first), *first, 37, {}) > 0
    assert RunFile.read(storage, "run") == RunFile("{}", 1, 2)
