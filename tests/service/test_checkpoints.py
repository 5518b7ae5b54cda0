"""Checkpoints: whole or not there, and equal to the run that wrote them, in however many parts."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

from forms import FORMS, PLAIN, own
from freestep.errors import CheckpointNotFound
from freestep.manifest import Manifest
from freestep.models import RunSpec
from freestep_service.checkpoints import Checkpoints
from freestep_service.records import CutId, Record
from freestep_service.run_files import LastEpochs, RunFile
from freestep_service.sealed import Damaged
from freestep_service.shard import Cut, Entry, Shard
from freestep_service.storage import LocalStorage, Storage, open_storage
from harness import TENSORS, Api, ThreadService, at_once, wait_until

RECORD = Record("claim", {"0": "digest"}, "applied", step=1, staleness=0, seq=1, live=1, worker="w", epoch=1)


def shard(form: str = "adamw_schedule_free", index: int = 0, count: int = 1, **changes: Any) -> Shard:
    """Shard `index` of `count` of a run of 37 elements."""
    document = {
        "optimizer": FORMS[form],
        "parameters": [{"name": "w", "shape": [31]}, {"name": "v", "shape": [2, 3], "group": "other"}],
        "groups": {"other": own(form, lr=0.5, weight_decay=0.2)},
        **changes,
    }
    spec = RunSpec.model_validate(document)
    manifest = Manifest(spec.parameters).part(index, count)
    made = Shard(spec, manifest, torch.device("cpu"))
    made.initialize(torch.randn(37, generator=torch.Generator().manual_seed(0))[manifest.begin : manifest.end], epoch=1)
    return made


def advance(made: Shard, entries: int, batch: int = 1) -> None:
    """Applies entries whose gradients depend on their place alone."""
    for seq in range(made.seq + 1, made.seq + 1 + entries):
        gradient = torch.randn(37, generator=torch.Generator().manual_seed(seq))
        gradient = gradient[made.manifest.begin : made.manifest.end].clone()
        made.apply(Entry(seq, made.epoch, advance=seq % batch == 0, gradient=gradient, worker=f"w{seq}", weight=seq))


def points(*shards: Shard) -> list[torch.Tensor]:
    """x, y and z of the whole run."""
    outs = [torch.empty(37) for _ in "xyz"]
    for point, out in zip("xyz", outs, strict=True):
        for made in shards:
            made.copy_point(point, out[made.manifest.begin : made.manifest.end])  # type: ignore[arg-type]
    return outs


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else f"memory://{uuid.uuid4()}/data")


def bounds(count: int) -> list[tuple[int, int]]:
    """Where the parts of `count` shards begin and end."""
    manifests = [shard(index=index, count=count).manifest for index in range(count)]
    return [(manifest.begin, manifest.end) for manifest in manifests]


def identity(cut: Cut) -> CutId:
    return CutId(cut.epoch, cut.step, cut.seq)


def part_of(cut: Cut, begin: int, end: int) -> Cut:
    """What a shard of the same run holds of a cut."""
    return dataclasses.replace(cut, tensors={name: tensor[begin:end].clone() for name, tensor in cut.tensors.items()})


def write(checkpoints: Checkpoints, cut: Cut, shards: int = 1, receipts: Mapping[str, Record] | None = None) -> CutId:
    """Writes all parts of a cut, as that many shards do."""
    for begin, end in bounds(shards):
        checkpoints.write(part_of(cut, begin, end), begin, end, 37, receipts or {})
    checkpoints.complete(identity(cut))
    return identity(cut)


def newest(checkpoints: Checkpoints, begin: int = 0, end: int = 37) -> Cut | None:
    """The newest checkpoint that passes its checks, found as a shard finds it."""
    while offers := checkpoints.offers(begin, end):
        try:
            return checkpoints.load(offers[-1], begin, end)[0]
        except Damaged:
            continue
    return None


def files(directory: Path, suffix: str = "") -> list[Path]:
    """The files of the newest cut under a storage's directory."""
    found = sorted(directory.glob("runs/run/checkpoints/*"))[-1]
    return sorted(each for each in found.iterdir() if each.name.endswith(suffix))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", PLAIN)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2), (3, 1)])
def test_going_on_from_a_checkpoint_is_never_having_stopped(
    storage: Storage, form: str, batch: int, before: int, after: int
) -> None:
    go_on(storage, form, batch, before, after)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in PLAIN])
def test_all_state_of_every_rule_is_in_a_checkpoint(storage: Storage, form: str) -> None:
    go_on(storage, form, batch=4, before=3, after=2)


def go_on(storage: Storage, form: str, batch: int, before: int, after: int) -> None:
    """Stops a run of some shards, goes on with others, and compares it with one that never stopped."""

    def run(count: int) -> list[Shard]:
        aggregation = {"policy": "buffered", "batch": batch}
        return [shard(form, index, count, aggregation=aggregation) for index in range(count)]

    (straight,), stopped, resumed = run(1), run(before), run(after)
    advance(straight, 41, batch)
    checkpoints = Checkpoints(storage, "run", keep=3)
    cut = CutId(1, 10 // batch, 10)
    for part in stopped:
        advance(part, 10, batch)
        checkpoints.write(part.cut(), part.manifest.begin, part.manifest.end, 37, {"key": RECORD})
    checkpoints.complete(cut)
    for part in resumed:
        stretch = part.manifest.begin, part.manifest.end
        assert checkpoints.offers(*stretch) == [cut]
        loaded, receipts = checkpoints.load(cut, *stretch)
        assert receipts == {"key": RECORD}
        part.load(loaded, epoch=2)
        assert (part.epoch, part.position()) == (2, stopped[0].position())
        advance(part, 31, batch)
        assert (part.step, part.seq) == (straight.step, straight.seq)
    for mine, theirs in zip(points(*resumed), points(straight), strict=True):
        assert torch.equal(mine, theirs)


def test_a_cut_does_not_move_with_the_shard() -> None:
    made = shard()
    advance(made, 3)
    cut = made.cut()
    kept = {name: tensor.clone() for name, tensor in cut.tensors.items()}
    advance(made, 3)
    assert all(torch.equal(cut.tensors[name], kept[name]) for name in kept)


def test_a_part_is_a_safetensors_file_of_flat_vectors(tmp_path: Path) -> None:
    made = shard()
    advance(made, 2)
    write(Checkpoints(LocalStorage(tmp_path), "run", keep=1), made.cut(), 2)
    for (begin, end), file in zip(bounds(2), files(tmp_path, ".safetensors"), strict=True):
        read = safetensors.torch.load_file(file)
        assert read.keys() == made.cut().tensors.keys()
        assert all(torch.equal(read[name], tensor[begin:end]) for name, tensor in made.cut().tensors.items())


def test_stretches_that_no_shard_wrote_are_cut_out_of_those_that_they_did(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    advance(made, 2)
    whole = made.cut()
    cut = write(checkpoints, whole, 3)
    for begin in range(38):
        for end in range(begin, 38):
            tensors = checkpoints.load(cut, begin, end)[0].tensors
            assert all(torch.equal(tensors[name], whole.tensors[name][begin:end]) for name in whole.tensors)


def test_an_empty_shard_finds_its_state_in_any_part(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    advance(made, 2)
    begin, end = bounds(3)[1]
    checkpoints.write(part_of(made.cut(), begin, end), begin, end, 37, {"key": RECORD})
    assert checkpoints.offers(37, 37) == [identity(made.cut())]
    cut, receipts = checkpoints.load(identity(made.cut()), 37, 37)
    assert (cut.scalars, receipts) == (made.cut().scalars, {"key": RECORD})
    assert {name: len(tensor) for name, tensor in cut.tensors.items()} == dict.fromkeys(made.cut().tensors, 0)


def test_a_shard_without_elements_has_a_part(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    empty = part_of(made.cut(), 0, 0)
    assert checkpoints.write(empty, 0, 0, 0, {}) == checkpoints.write(empty, 0, 0, 0, {})
    assert checkpoints.offers(0, 0) == [identity(empty)]
    assert [each.step for each in checkpoints.all()] == [0]
    assert checkpoints.load(identity(empty), 0, 0)[0].scalars == empty.scalars


def test_a_cut_is_offered_where_its_parts_are_and_listed_when_they_are_all_there(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    parts = bounds(3)
    cut = identity(made.cut())
    for index in (2, 0):
        checkpoints.write(part_of(made.cut(), *parts[index]), *parts[index], 37, {})
    assert [checkpoints.offers(*part) for part in parts] == [[cut], [], [cut]]
    assert checkpoints.offers(0, 37) == []
    assert checkpoints.all() == []
    with pytest.raises(Damaged, match="not all there"):
        checkpoints.load(cut, 0, 37)
    with pytest.raises(CheckpointNotFound):
        checkpoints.at(0)
    size = checkpoints.write(part_of(made.cut(), *parts[1]), *parts[1], 37, {})
    assert checkpoints.offers(0, 37) == [cut]
    assert [(each.epoch, each.step) for each in checkpoints.all()] == [(1, 0)]
    assert checkpoints.all()[0].bytes > 2 * size
    assert checkpoints.at(0) == cut


def test_a_complete_cut_is_listed_though_the_other_parts_are_on_other_hosts(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=1)
    begin, end = bounds(2)[0]
    checkpoints.write(part_of(made.cut(), begin, end), begin, end, 37, {})
    checkpoints.complete(identity(made.cut()))
    assert [each.step for each in checkpoints.all()] == [0]
    assert checkpoints.at(0) == identity(made.cut())
    assert checkpoints.offers(0, 37) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=2)
    for _ in range(4):
        advance(made, 1)
        write(checkpoints, made.cut(), 2)
    assert [each.step for each in checkpoints.all()] == [3, 4]
    assert len(list(tmp_path.glob("runs/run/checkpoints/*"))) == 2


def test_what_was_never_completed_is_dropped_when_something_newer_is(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=2)
    begin, end = bounds(3)[0]
    for _ in range(4):
        advance(made, 1)
        checkpoints.write(part_of(made.cut(), begin, end), begin, end, 37, {})
    write(checkpoints, made.cut(), 1)
    advance(made, 1)
    checkpoints.write(part_of(made.cut(), begin, end), begin, end, 37, {})
    assert [cut.step for cut in checkpoints.offers(begin, end)] == [4, 5]


def test_a_cut_that_covers_the_run_is_kept_though_nobody_completed_it(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=2)
    checkpoints.write(made.cut(), 0, 37, 37, {})
    for _ in range(2):
        advance(made, 1)
        write(checkpoints, made.cut())
        assert [each.step for each in checkpoints.all()] == [made.step - 1, made.step]


def test_a_later_epoch_is_newer_than_a_later_step(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    advance(made, 5)
    write(checkpoints, made.cut())
    early = shard()
    advance(early, 2)
    early.load(early.cut(), epoch=2)
    write(checkpoints, early.cut())
    assert checkpoints.offers(0, 37) == [(1, 5, 5), (2, 2, 2)]
    assert [(each.epoch, each.step) for each in checkpoints.all()] == [(1, 5), (2, 2)]


def test_of_two_epochs_with_a_step_the_newer_is_gone_back_to(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    for epoch in (1, 2):
        made.load(made.cut(), epoch)
        write(checkpoints, made.cut())
    assert checkpoints.at(0) == (2, 0, 0)


@pytest.mark.parametrize("suffix", ["7.json", ".safetensors"])
def test_a_damaged_part_of_the_same_cut_is_written_anew(tmp_path: Path, suffix: str) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    cut = write(checkpoints, made.cut())
    (file,) = files(tmp_path, suffix)
    flip_a_bit(file)
    with pytest.raises(Damaged):
        checkpoints.load(cut, 0, 37)
    assert checkpoints.offers(0, 37) == []
    write(checkpoints, made.cut(), receipts={"key": RECORD})
    assert checkpoints.offers(0, 37) == [cut]
    assert checkpoints.load(cut, 0, 37)[1] == {"key": RECORD}
    assert len(files(tmp_path)) == 3


def test_the_same_part_twice_is_one(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    size = checkpoints.write(made.cut(), 0, 37, 37, {})
    assert size == files(tmp_path, ".safetensors")[0].stat().st_size
    before = [file.stat().st_ino for file in files(tmp_path)]
    assert checkpoints.write(made.cut(), 0, 37, 37, {"key": RECORD}) == size
    assert [file.stat().st_ino for file in files(tmp_path)] == before


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" x")


def make_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [cut_short, flip_a_bit, append, make_a_directory, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_damaged_checkpoint_is_skipped_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, index: int, damage: Callable[[Path], None]
) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    for _ in range(2):
        advance(made, 1)
        write(checkpoints, made.cut(), 3)
    damage(files(tmp_path, suffix)[index])
    with caplog.at_level(logging.ERROR):
        loaded = newest(checkpoints)
    assert loaded is not None
    assert loaded.step == 1
    if (suffix, damage) != (".json", Path.unlink):
        assert "is damaged and skipped" in caplog.text
        assert [each.step for each in checkpoints.all()] == [1]
        with pytest.raises(CheckpointNotFound, match="is damaged"):
            checkpoints.at(2)
    for other, (begin, end) in enumerate(bounds(3)):
        loaded = newest(checkpoints, begin, end)
        assert loaded is not None
        assert loaded.step == (1 if other == index else 2)


def test_what_is_damaged_in_one_part_is_taken_from_another(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    advance(made, 2)
    cut = made.cut()
    write(checkpoints, cut, 1)
    write(checkpoints, cut, 3)
    whole = files(tmp_path, "000000000000000-000000000000037.safetensors")[0]
    flip_a_bit(whole)
    loaded = checkpoints.load(identity(cut), 0, 37)[0]
    assert all(torch.equal(loaded.tensors[name], cut.tensors[name]) for name in cut.tensors)
    assert [each.step for each in checkpoints.all()] == [2]


def test_parts_of_different_states_are_no_checkpoint(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    first, second = bounds(2)
    checkpoints.write(part_of(made.cut(), *first), *first, 37, {})
    other = dataclasses.replace(part_of(made.cut(), *second), damping=0.5)
    checkpoints.write(other, *second, 37, {})
    with pytest.raises(Damaged, match="not of the same state"):
        checkpoints.load(identity(other), 0, 37)
    assert checkpoints.offers(0, 37) == []


def sealed(document: dict[str, Any]) -> bytes:
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
    return json.dumps({**document, "checksum": checksum}).encode()


def changed(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda document: sealed({**document, **fields})


@pytest.mark.parametrize(
    "make",
    [
        lambda document: b"",
        lambda document: b"\xff\xfe\x00",
        lambda document: b"[" * 100_000,
        *[
            lambda document, text=text: text
            for text in (b"null", b"1", b'"a"', b"[]", b"[1]", b"{}", b'{"checksum": []}')
        ],
        lambda document: b'{"checksum": ' + b"1" * 5000 + b"}",
        lambda document: sealed({}),
        lambda document: sealed({"format": 2}),
        *[
            lambda document, name=name: sealed({key: document[key] for key in document if key != name})
            for name in ("step", "tensors")
        ],
        changed(format=1),
        changed(format=[]),
        changed(epoch=7),
        changed(begin=1),
        changed(begin=50),
        changed(begin=None),
        changed(end=10**30),
        changed(numel=3),
        changed(bytes=1),
        changed(bytes="many"),
        changed(tensors=None),
        changed(vectors=["y", "y"]),
        changed(vectors=["__metadata__"]),
        changed(vectors=["\ud800"]),
        changed(vectors=[[]]),
        changed(vectors="y"),
        changed(scalars=[]),
        changed(scalars={"default": {"k": "1"}}),
        changed(group={"w": 0.5}),
        changed(weight=None),
        changed(receipts={"key": 1}),
        changed(receipts={"key": {}}),
        changed(receipts={"key": {"self": 1}}),
        changed(receipts=[[1, 2]]),
    ],
)
def test_a_manifest_of_any_shape_is_skipped_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[dict[str, Any]], bytes]
) -> None:
    checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    cut = write(checkpoints, shard().cut())
    (file,) = files(tmp_path, "7.json")
    document = json.loads(file.read_bytes())
    del document["checksum"]
    file.write_bytes(sealed(document))
    assert checkpoints.offers(0, 37) == [cut]
    file.write_bytes(make(document))
    for _ in range(2):
        assert checkpoints.offers(0, 37) == []
        assert checkpoints.all() == []
        assert "is damaged and skipped" in caplog.text
        caplog.clear()
    with pytest.raises(Damaged):
        checkpoints.load(cut, 0, 37)
    with pytest.raises(CheckpointNotFound):
        checkpoints.at(0)


def test_names_of_another_kind_are_no_cuts_and_no_parts(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    cut = write(checkpoints, made.cut())
    directory = files(tmp_path)[0].parent
    for name in ("1-2-3", "notes", "00000001-000000000000-00000000000x", ".00000001-000000000009-000000000009"):
        (directory.parent / name).mkdir()
    for name in ("a.json", "0-37.json", "000000000000000-000000000000037.json.bak"):
        (directory / name).write_text("{")
    assert checkpoints.offers(0, 37) == [cut]
    assert [each.step for each in checkpoints.all()] == [0]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=1)
    write(checkpoints, made.cut())
    advance(made, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, files(tmp_path, ".safetensors")[0].stat().st_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                checkpoints.write(made.cut(), 0, 37, 37, {f"key-{number}": RECORD for number in range(100)})
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
from freestep.models import RunSpec
from freestep.manifest import Manifest
from freestep_service.checkpoints import Checkpoints
from freestep_service.records import CutId
from freestep_service.shard import Entry, Shard
from freestep_service.storage import open_storage
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
    cut = shard.cut()
    checkpoints.write(cut, 0, 200_000, 200_000, {})
    checkpoints.complete(CutId(cut.epoch, cut.step, cut.seq))
    print(cut.step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_a_newest_that_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = 0
    for count in (1, 4, 7):
        command = [sys.executable, "-c", SAVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            for _ in range(count):
                said = int(saver.stdout.readline())
            saver.kill()
        checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=2)
        offers = checkpoints.offers(0, 200_000)
        assert offers[-1].step >= said
        assert {cut.step for cut in offers} == {checkpoints.load(cut, 0, 200_000)[0].step for cut in offers}
    assert caplog.text == ""


PRUNER = """
import sys
from freestep_service.checkpoints import Checkpoints
from freestep_service.storage import open_storage
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
        write(checkpoints, made.cut(), 3)
    command = [sys.executable, "-c", PRUNER, str(tmp_path)]
    pipe = subprocess.PIPE
    pruners = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) for _ in range(3)
    ]
    for pruner in pruners:
        assert pruner.stdout is not None
        assert pruner.stdout.readline() == "ready\n"
    for pruner in pruners:
        assert pruner.stdin is not None
        pruner.stdin.write("\n")
        pruner.stdin.flush()
    assert [(pruner.communicate()[0], pruner.returncode) for pruner in pruners] == [("", 0)] * 3
    assert [each.step for each in checkpoints.all()] == [29, 30]
    assert len(list(tmp_path.glob("runs/run/checkpoints/*"))) == 2


def test_threads_write_list_and_drop_at_the_same_time(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    made = shard()
    cuts = []
    for _ in range(10):
        advance(made, 1)
        cuts.append(made.cut())
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        begin, end = bounds(4)[index]
        own = Checkpoints(storage, "run", keep=2)
        try:
            for cut in cuts:
                own.write(part_of(cut, begin, end), begin, end, 37, {})
                barrier.wait()
                own.complete(identity(cut))
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
    assert all(torch.equal(loaded.tensors[name], cuts[-1].tensors[name]) for name in loaded.tensors)
    assert caplog.text == ""


def test_without_checkpoints(storage: Storage) -> None:
    checkpoints = Checkpoints(storage, "run", keep=1)
    assert checkpoints.offers(0, 37) == []
    assert checkpoints.all() == []
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 3"):
        checkpoints.at(3)
    with pytest.raises(Damaged):
        checkpoints.load(CutId(1, 0, 0), 0, 37)
    assert checkpoints.closed(0, 37) is None
    checkpoints.clear_closed(0, 37)
    checkpoints.remove()


def test_an_orderly_shutdown_is_remembered_of_each_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=1)
    for seq, (begin, end) in enumerate(bounds(2)):
        checkpoints.mark_closed(begin, end, epoch=3, seq=seq)
    assert [checkpoints.closed(*part) for part in bounds(2)] == [(3, 0), (3, 1)]
    assert checkpoints.closed(0, 37) is None
    checkpoints.clear_closed(*bounds(2)[0])
    assert [checkpoints.closed(*part) for part in bounds(2)] == [None, (3, 1)]
    assert caplog.text == ""
    (file,) = (tmp_path / "runs" / "run" / "closed").iterdir()
    for damage in (flip_a_bit, cut_short, lambda file: file.write_bytes(sealed({"format": 2, "epoch": 3}))):
        checkpoints.mark_closed(*bounds(2)[1], epoch=3, seq=1)
        damage(file)
        assert checkpoints.closed(*bounds(2)[1]) is None
        assert "is damaged and skipped" in caplog.text
        caplog.clear()


def test_nothing_is_left_of_a_run_that_was_removed_and_all_of_the_others(storage: Storage) -> None:
    for run in ("run", "run-2"):
        RunFile("{}", 3, 2).write(storage, run)
        checkpoints = Checkpoints(storage, run, keep=1)
        write(checkpoints, shard().cut(), 2)
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


def checkpoint_steps(api: Api) -> list[int]:
    return [each["step"] for each in api.http.get(api.path("/checkpoints")).json()["checkpoints"]]


@pytest.mark.parametrize("settings", [{"checkpoint_steps": 5}, {"checkpoint_seconds": 0.05}])
def test_checkpoints_are_written_in_the_background(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], settings: dict[str, Any]
) -> None:
    api = connect(start_service(**settings).url)
    api.create()
    lease = api.lease()
    for step in range(5):
        api.push(lease, step)
    wait_until(lambda: checkpoint_steps(api)[-1] == 5)
    wait_until(lambda: api.status()["checkpoint_step"] == 5)


def test_the_last_checkpoint_is_written_at_shutdown(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_service(tmp_path / "data")
    api = connect(service.url)
    api.create()
    api.push(api.lease(), 0, "key")
    service.stop()
    checkpoints = Checkpoints(LocalStorage(tmp_path / "data"), api.run, keep=1)
    cut, receipts = checkpoints.load(checkpoints.at(1), 0, 7)
    assert cut.step == 1
    assert receipts["key"].decision == "applied"


def test_a_run_whose_last_checkpoint_fails_does_not_cost_the_others_theirs(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_service(tmp_path / "data")
    first, second = connect(service.url, "first"), connect(service.url, "second")
    for api in (first, second):
        api.create()
        api.push(api.lease(), 0)
    checkpoints = tmp_path / "data" / "runs" / "first" / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.touch()
    service.stop()
    checkpoints.unlink()
    again = connect(start_service(tmp_path / "data").url, "second")
    assert (again.status()["epoch"], again.status()["step"]) == (1, 1)


def test_going_back_and_on_is_never_having_been_elsewhere(api: Api, service: ThreadService) -> None:
    def gradient(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in TENSORS.items()}

    def train(first: int, last: int) -> None:
        lease = api.lease()
        for step in range(first, last):
            assert api.push(lease, step, tensors=gradient(step)).json()["step"] == step + 1

    api.create(optimizer={"algorithm": "adamw_schedule_free", "warmup_steps": 4, "weight_decay": 0.1})
    train(0, 3)
    api.http.post(api.path("/checkpoints"))
    train(3, 8)
    points = [safetensors.torch.save(api.pull(point)[0]) for point in "xyz"]
    assert api.http.post(api.path("/checkpoints/3/restore")).json()["epoch"] == 2
    train(3, 8)
    assert [safetensors.torch.save(api.pull(point)[0]) for point in "xyz"] == points


def test_a_damaged_checkpoint_is_not_gone_back_to(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    api = connect(start_service(tmp_path / "data").url)
    api.create()
    for file in (tmp_path / "data" / "runs" / api.run / "checkpoints").glob("*/*.safetensors"):
        flip_a_bit(file)
    answer = api.http.post(api.path("/checkpoints/0/restore"))
    assert answer.status_code == 404
    assert "is damaged" in answer.json()["detail"]
    assert api.status()["epoch"] == 1
