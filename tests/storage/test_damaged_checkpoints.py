"""Any damage to a checkpoint's files is detected and logged, and the checkpoint skipped."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointed import (
    RECORD,
    advance,
    bounds,
    cut_short,
    files,
    flip_a_bit,
    identity,
    newest,
    part_of,
    sealed,
    shard,
    write,
)
from freestep.errors import CheckpointNotFound
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import LocalStorage, Storage


@pytest.mark.parametrize("suffix", ["7.json", ".safetensors"])
def test_a_damaged_part_of_the_same_cut_is_written_anew(tmp_path: Path, suffix: str) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    cut = write(checkpoints, made.copy_state())
    (file,) = files(tmp_path, suffix)
    flip_a_bit(file)
    with pytest.raises(Damaged):
        checkpoints.load(cut, 0, 37)
    assert checkpoints.offers(0, 37) == []
    write(checkpoints, made.copy_state(), receipts={"key": RECORD})
    assert checkpoints.offers(0, 37) == [cut]
    assert checkpoints.load(cut, 0, 37)[1] == {"key": RECORD}
    assert len(files(tmp_path)) == 3


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
        write(checkpoints, made.copy_state(), 3)
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
    cut = made.copy_state()
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
    checkpoints.write(part_of(made.copy_state(), *first), *first, 37, {})
    other = dataclasses.replace(part_of(made.copy_state(), *second), damping=0.5)
    checkpoints.write(other, *second, 37, {})
    with pytest.raises(Damaged, match="not of the same state"):
        checkpoints.load(identity(other), 0, 37)
    assert checkpoints.offers(0, 37) == []


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
    cut = write(checkpoints, shard().copy_state())
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
