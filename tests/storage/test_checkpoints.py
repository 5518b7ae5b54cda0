"""Checkpoints: whole or not there, and equal to the state that was written, in any number of parts."""

from __future__ import annotations

import resource
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpointed import (
    RECORD,
    advance,
    bounds,
    files,
    flip_a_bit,
    newest,
    part_of,
    points,
    shard,
    truncate,
    with_checksum,
    write,
)
from forked import Script
from forms import FORMS, PLAIN
from freestep.errors import CheckpointNotFound, StorageUnavailable
from freestep_service.domain.records import CheckpointId
from freestep_service.state.shard import Shard
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import LocalStorage, Storage
from meanwhile import DEADLINE_S, at_once


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", PLAIN)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2), (3, 1)])
def test_a_run_continued_from_a_checkpoint_equals_one_that_never_stopped(
    storage: Storage, form: str, batch: int, before: int, after: int
) -> None:
    compare_continued(storage, form, batch, before, after)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in PLAIN])
def test_all_state_of_every_rule_is_in_a_checkpoint(storage: Storage, form: str) -> None:
    compare_continued(storage, form, batch=4, before=3, after=2)


def compare_continued(storage: Storage, form: str, batch: int, before: int, after: int) -> None:
    """Stops a run of `before` shards, continues it with `after`, and compares it with one that never stopped."""

    def run(count: int) -> list[Shard]:
        aggregation = {"policy": "buffered", "batch": batch}
        return [shard(form, index, count, aggregation=aggregation) for index in range(count)]

    (straight,), stopped, resumed = run(1), run(before), run(after)
    advance(straight, 41, batch)
    checkpoints = Checkpoints(storage, "run", keep=3)
    checkpoint_id = CheckpointId(1, 10 // batch, 10)
    for part in stopped:
        advance(part, 10, batch)
        checkpoints.write(part.copy_state(), part.manifest.begin, part.manifest.end, 37, {"key": RECORD})
    checkpoints.complete(checkpoint_id)
    for part in resumed:
        stretch = part.manifest.begin, part.manifest.end
        assert checkpoints.offers(*stretch) == [checkpoint_id]
        loaded, receipts = checkpoints.load(checkpoint_id, *stretch)
        assert receipts == {"key": RECORD}
        part.load(loaded, epoch=2)
        assert (part.epoch, part.position()) == (2, stopped[0].position())
        advance(part, 31, batch)
        assert (part.step, part.seq) == (straight.step, straight.seq)
    for mine, theirs in zip(points(*resumed), points(straight), strict=True):
        assert torch.equal(mine, theirs)


def test_a_copy_of_the_state_does_not_change_with_the_shard() -> None:
    made = shard()
    advance(made, 3)
    copy = made.copy_state()
    kept = {name: tensor.clone() for name, tensor in copy.tensors.items()}
    advance(made, 3)
    assert all(torch.equal(copy.tensors[name], kept[name]) for name in kept)


def test_a_part_is_a_safetensors_file_of_flat_vectors(tmp_path: Path) -> None:
    made = shard()
    advance(made, 2)
    write(Checkpoints(LocalStorage(tmp_path), "run", keep=1), made.copy_state(), 2)
    for (begin, end), file in zip(bounds(2), files(tmp_path, ".safetensors"), strict=True):
        read = safetensors.torch.load_file(file)
        assert read.keys() == made.copy_state().tensors.keys()
        assert all(torch.equal(read[name], tensor[begin:end]) for name, tensor in made.copy_state().tensors.items())


def test_any_stretch_is_loaded_from_the_parts_that_overlap_it(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    advance(made, 2)
    whole = made.copy_state()
    checkpoint_id = write(checkpoints, whole, 3)
    for begin in range(38):
        for end in range(begin, 38):
            tensors = checkpoints.load(checkpoint_id, begin, end)[0].tensors
            assert all(torch.equal(tensors[name], whole.tensors[name][begin:end]) for name in whole.tensors)


def test_an_empty_shard_finds_its_state_in_any_part(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    advance(made, 2)
    begin, end = bounds(3)[1]
    checkpoints.write(part_of(made.copy_state(), begin, end), begin, end, 37, {"key": RECORD})
    assert checkpoints.offers(37, 37) == [id_of(made.copy_state())]
    state, receipts = checkpoints.load(id_of(made.copy_state()), 37, 37)
    assert (state.scalars, receipts) == (made.copy_state().scalars, {"key": RECORD})
    assert {name: len(tensor) for name, tensor in state.tensors.items()} == dict.fromkeys(made.copy_state().tensors, 0)


def test_a_shard_without_elements_has_a_part(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    empty = part_of(made.copy_state(), 0, 0)
    assert checkpoints.write(empty, 0, 0, 0, {}) == checkpoints.write(empty, 0, 0, 0, {})
    assert checkpoints.offers(0, 0) == [id_of(empty)]
    assert [each.step for each in checkpoints.all()] == [0]
    assert checkpoints.load(id_of(empty), 0, 0)[0].scalars == empty.scalars


def test_a_checkpoint_is_offered_where_its_parts_are_and_listed_when_they_are_all_there(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    parts = bounds(3)
    checkpoint_id = id_of(made.copy_state())
    for index in (2, 0):
        checkpoints.write(part_of(made.copy_state(), *parts[index]), *parts[index], 37, {})
    assert [checkpoints.offers(*part) for part in parts] == [[checkpoint_id], [], [checkpoint_id]]
    assert checkpoints.offers(0, 37) == []
    assert checkpoints.all() == []
    with pytest.raises(Damaged, match="not all there"):
        checkpoints.load(checkpoint_id, 0, 37)
    with pytest.raises(CheckpointNotFound):
        checkpoints.at(0)
    size = checkpoints.write(part_of(made.copy_state(), *parts[1]), *parts[1], 37, {})
    assert checkpoints.offers(0, 37) == [checkpoint_id]
    assert [(each.epoch, each.step) for each in checkpoints.all()] == [(1, 0)]
    assert checkpoints.all()[0].bytes > 2 * size
    assert checkpoints.at(0) == checkpoint_id


def test_a_complete_checkpoint_is_listed_though_other_parts_are_on_other_hosts(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    begin, end = bounds(2)[0]
    checkpoints.write(part_of(made.copy_state(), begin, end), begin, end, 37, {})
    checkpoints.complete(id_of(made.copy_state()))
    assert [each.step for each in checkpoints.all()] == [0]
    assert checkpoints.at(0) == id_of(made.copy_state())
    assert checkpoints.offers(0, 37) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=2)
    for _ in range(4):
        advance(made, 1)
        write(checkpoints, made.copy_state(), 2)
    assert [each.step for each in checkpoints.all()] == [3, 4]
    assert len(list(tmp_path.glob("runs/run/checkpoints/*"))) == 2


def test_an_incomplete_checkpoint_is_dropped_once_a_newer_one_is_complete(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=2)
    begin, end = bounds(3)[0]
    for _ in range(4):
        advance(made, 1)
        checkpoints.write(part_of(made.copy_state(), begin, end), begin, end, 37, {})
    write(checkpoints, made.copy_state(), 1)
    advance(made, 1)
    checkpoints.write(part_of(made.copy_state(), begin, end), begin, end, 37, {})
    assert [each.step for each in checkpoints.offers(begin, end)] == [4, 5]


def test_a_checkpoint_that_covers_the_run_is_kept_though_it_was_not_completed(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=2)
    checkpoints.write(made.copy_state(), 0, 37, 37, {})
    for _ in range(2):
        advance(made, 1)
        write(checkpoints, made.copy_state())
        assert [each.step for each in checkpoints.all()] == [made.step - 1, made.step]


def test_a_later_epoch_is_newer_than_a_later_step(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    advance(made, 5)
    write(checkpoints, made.copy_state())
    early = shard()
    advance(early, 2)
    early.load(early.copy_state(), epoch=2)
    write(checkpoints, early.copy_state())
    assert checkpoints.offers(0, 37) == [(1, 5, 5), (2, 2, 2)]
    assert [(each.epoch, each.step) for each in checkpoints.all()] == [(1, 5), (2, 2)]


def test_a_step_names_the_checkpoint_of_its_newest_epoch(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    for epoch in (1, 2):
        made.load(made.copy_state(), epoch)
        write(checkpoints, made.copy_state())
    assert checkpoints.at(0) == (2, 0, 0)


def test_a_whole_part_is_not_written_again(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    size = checkpoints.write(made.copy_state(), 0, 37, 37, {})
    assert size == files(tmp_path, ".safetensors")[0].stat().st_size
    before = [file.stat().st_ino for file in files(tmp_path)]
    assert checkpoints.write(made.copy_state(), 0, 37, 37, {"key": RECORD}) == size
    assert [file.stat().st_ino for file in files(tmp_path)] == before


def test_names_of_another_kind_are_no_checkpoints_and_no_parts(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    checkpoint_id = write(checkpoints, made.copy_state())
    directory = files(tmp_path)[0].parent
    for name in ("1-2-3", "notes", "00000001-000000000000-00000000000x", ".00000001-000000000009-000000000009"):
        (directory.parent / name).mkdir()
    for name in ("a.json", "0-37.json", "000000000000000-000000000000037.json.bak"):
        (directory / name).write_text("{")
    assert checkpoints.offers(0, 37) == [checkpoint_id]
    assert [each.step for each in checkpoints.all()] == [0]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=1)
    write(checkpoints, made.copy_state())
    advance(made, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, files(tmp_path, ".safetensors")[0].stat().st_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(StorageUnavailable, match="cannot be written: File too large"):
                checkpoints.write(made.copy_state(), 0, 37, 37, {f"key-{number}": RECORD for number in range(100)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        loaded = newest(checkpoints)
        assert loaded is not None
        assert loaded.step == 0
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3


SAVER = """
import sys
from pathlib import Path
import torch
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from freestep_service.storage.media import open_storage
document = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [200_000]}]}
spec = RunSpec.model_validate(document)
shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"))
checkpoints = Checkpoints(open_storage(sys.argv[1]), "run", keep=2)
offers = checkpoints.offers(0, 200_000)
if offers:
    shard.load(checkpoints.load(offers[-1], 0, 200_000)[0], epoch=1)
else:
    shard.initialize(torch.zeros(200_000), epoch=1)
while True:
    shard.apply(Entry(shard.seq + 1, 1, advance=True, gradient=torch.ones(200_000)))
    copy = shard.copy_state()
    checkpoints.write(copy, 0, 200_000, 200_000, {})
    checkpoints.complete(id_of(copy))
    print(copy.step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_a_whole_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (1, 4, 7):
        with Script(SAVER, str(tmp_path)) as saver:
            written = [int(saver.read_line()) for _ in range(count)]
            saver.kill()
        checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=2)
        offers = checkpoints.offers(0, 200_000)
        assert offers[-1].step >= written[-1]
        assert {each.step for each in offers} == {checkpoints.load(each, 0, 200_000)[0].step for each in offers}
    assert caplog.text == ""


PRUNER = """
import os, sys
os.dup2(1, 2)  # so that a log line would be seen
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.media import open_storage
checkpoints = Checkpoints(open_storage(sys.argv[1]), "run", keep=2)
newest = checkpoints.offers(0, 37)[-1]
print("ready", flush=True)
sys.stdin.readline()
checkpoints.complete(newest)
"""


def test_processes_drop_the_same_checkpoints_at_the_same_time(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=100)
    for _ in range(30):
        advance(made, 1)
        write(checkpoints, made.copy_state(), 3)
    with ExitStack() as stack:
        pruners = [stack.enter_context(Script(PRUNER, str(tmp_path))) for _ in range(3)]
        assert [pruner.read_line() for pruner in pruners] == ["ready"] * 3
        for pruner in pruners:
            pruner.write_line("")
        assert [(pruner.read_line(), pruner.wait()) for pruner in pruners] == [("", 0)] * 3
    assert [each.step for each in checkpoints.all()] == [29, 30]
    assert len(list(tmp_path.glob("runs/run/checkpoints/*"))) == 2


@pytest.mark.parametrize("storage", ["directory", "fsspec-directory"], indirect=True)
def test_threads_write_list_and_drop_at_the_same_time(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    made = shard()
    copies = []
    for _ in range(10):
        advance(made, 1)
        copies.append(made.copy_state())
    barrier = threading.Barrier(4, timeout=DEADLINE_S)

    def work(index: int) -> None:
        begin, end = bounds(4)[index]
        own = Checkpoints(storage, "run", keep=2)
        try:
            for copy in copies:
                own.write(part_of(copy, begin, end), begin, end, 37, {})
                barrier.wait()
                own.complete(id_of(copy))
                own.all()
                barrier.wait()
        except BaseException:
            barrier.abort()
            raise

    at_once(*(partial(work, index) for index in range(4)))
    checkpoints = Checkpoints(storage, "run", keep=2)
    assert [each.step for each in checkpoints.all()] == [9, 10]
    loaded = newest(checkpoints)
    assert loaded is not None
    assert all(torch.equal(loaded.tensors[name], copies[-1].tensors[name]) for name in loaded.tensors)
    assert caplog.text == ""


def test_without_checkpoints(storage: Storage) -> None:
    checkpoints = Checkpoints(storage, "run", keep=1)
    assert checkpoints.offers(0, 37) == []
    assert checkpoints.all() == []
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 3"):
        checkpoints.at(3)
    with pytest.raises(Damaged):
        checkpoints.load(CheckpointId(1, 0, 0), 0, 37)
    assert checkpoints.closed(0, 37) is None
    checkpoints.clear_closed(0, 37)
    checkpoints.remove(1)


def test_an_orderly_shutdown_is_recorded_for_each_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=1)
    for seq, (begin, end) in enumerate(bounds(2)):
        checkpoints.mark_closed(begin, end, epoch=3, seq=seq)
    assert [checkpoints.closed(*part) for part in bounds(2)] == [(3, 0), (3, 1)]
    assert checkpoints.closed(0, 37) is None
    checkpoints.clear_closed(*bounds(2)[0])
    assert [checkpoints.closed(*part) for part in bounds(2)] == [None, (3, 1)]
    assert caplog.text == ""
    (file,) = (tmp_path / "runs" / "run" / "closed").iterdir()
    for damage in (flip_a_bit, truncate, lambda file: file.write_bytes(with_checksum({"format": 2, "epoch": 3}))):
        checkpoints.mark_closed(*bounds(2)[1], epoch=3, seq=1)
        damage(file)
        assert checkpoints.closed(*bounds(2)[1]) is None
        assert "is damaged and skipped" in caplog.text
        caplog.clear()
