"""Damage to a checkpoint's files: all of it is noticed, skipped and logged."""

from __future__ import annotations

import dataclasses
import io
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
    files,
    flip_a_bit,
    newest,
    part_of,
    shard,
    truncate,
    with_checksum,
    write,
)
from freestep.errors import CheckpointNotFound
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.media import LocalStorage, Storage


@pytest.mark.parametrize("suffix", ["7.json", ".safetensors"])
def test_a_damaged_part_of_the_same_checkpoint_is_written_anew(tmp_path: Path, suffix: str) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    checkpoint_id = write(checkpoints, made.copy_state())
    (file,) = files(tmp_path, suffix)
    flip_a_bit(file)
    with pytest.raises(Damaged):
        checkpoints.load(checkpoint_id, 0, 37)
    assert checkpoints.offers(0, 37) == []
    write(checkpoints, made.copy_state(), receipts={"key": RECORD})
    assert checkpoints.offers(0, 37) == [checkpoint_id]
    assert checkpoints.load(checkpoint_id, 0, 37)[1] == {"key": RECORD}
    assert len(files(tmp_path)) == 3


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" x")


def make_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [truncate, flip_a_bit, append, make_a_directory, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_damaged_checkpoint_is_skipped_and_logged(
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


def test_elements_of_a_damaged_part_are_taken_from_another(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    advance(made, 2)
    copy = made.copy_state()
    write(checkpoints, copy, 1)
    write(checkpoints, copy, 3)
    whole = files(tmp_path, "000000000000000-000000000000037.safetensors")[0]
    flip_a_bit(whole)
    loaded = checkpoints.load(id_of(copy), 0, 37)[0]
    assert all(torch.equal(loaded.tensors[name], copy.tensors[name]) for name in copy.tensors)
    assert [each.step for each in checkpoints.all()] == [2]


class Dropping(LocalStorage):
    """A directory in which another process drops the older checkpoint as soon as its tensors are to be read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.drop: Callable[[], object] = lambda: None

    def _open(self, path: str) -> io.BufferedReader:
        self.drop()
        return super()._open(path)


def test_a_checkpoint_that_is_dropped_while_it_is_read_is_not_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Dropping(tmp_path)
    made, checkpoints, others = shard(), Checkpoints(storage, "run", 1), Checkpoints(LocalStorage(tmp_path), "run", 1)
    older = write(checkpoints, made.copy_state())
    advance(made, 1)
    storage.drop = lambda: write(others, made.copy_state())
    with pytest.raises(Damaged):
        checkpoints.load(older, 0, 37)
    assert caplog.text == ""
    with pytest.raises(CheckpointNotFound, match="there is no checkpoint of step 0"):
        checkpoints.at(0)


def test_only_the_vectors_that_are_wanted_are_loaded(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    advance(made, 2)
    copy = made.copy_state()
    for shards in (1, 3):
        write(checkpoints, copy, shards)
        loaded = checkpoints.load(id_of(copy), 5, 20, ["z", "exp_avg_sq", "none"]).state
        assert list(loaded.tensors) == [name for name in copy.tensors if name in ("z", "exp_avg_sq")]
        assert all(torch.equal(tensor, copy.tensors[name][5:20]) for name, tensor in loaded.tensors.items())
        assert (loaded.step, loaded.scalars) == (copy.step, copy.scalars)


def test_parts_of_different_states_are_no_checkpoint(storage: Storage) -> None:
    made, checkpoints = shard(), Checkpoints(storage, "run", keep=5)
    first, second = bounds(2)
    checkpoints.write(part_of(made.copy_state(), *first), *first, 37, {})
    other = dataclasses.replace(part_of(made.copy_state(), *second), damping=0.5)
    checkpoints.write(other, *second, 37, {})
    with pytest.raises(Damaged, match="not of the same state"):
        checkpoints.load(id_of(other), 0, 37)
    assert checkpoints.offers(0, 37) == []


def changed(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda document: with_checksum({**document, **fields})


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
        lambda document: with_checksum({}),
        lambda document: with_checksum({"format": 2}),
        *[
            lambda document, name=name: with_checksum({key: document[key] for key in document if key != name})
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
def test_a_manifest_with_any_content_is_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[dict[str, Any]], bytes]
) -> None:
    checkpoints = Checkpoints(LocalStorage(tmp_path), "run", keep=5)
    checkpoint_id = write(checkpoints, shard().copy_state())
    (file,) = files(tmp_path, "7.json")
    document = json.loads(file.read_bytes())
    del document["checksum"]
    file.write_bytes(with_checksum(document))
    assert checkpoints.offers(0, 37) == [checkpoint_id]
    file.write_bytes(make(document))
    for _ in range(2):
        assert checkpoints.offers(0, 37) == []
        assert checkpoints.all() == []
        assert "is damaged and skipped" in caplog.text
        caplog.clear()
    with pytest.raises(Damaged):
        checkpoints.load(checkpoint_id, 0, 37)
    with pytest.raises(CheckpointNotFound):
        checkpoints.at(0)
