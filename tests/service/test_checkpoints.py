"""Checkpoints: whole or not there, and equal to the run that wrote them."""

from __future__ import annotations

import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from freestep.errors import CheckpointNotFound
from freestep.models import ALGORITHMS, RunSpec
from freestep_service.checkpoints import Checkpoints, RunFile
from freestep_service.records import Record
from freestep_service.shard import Entry, Shard
from harness import TENSORS, Api, ThreadService

RECORD = Record("claim", "digest", "applied", step=1, staleness=0, seq=1, live=1, worker="w", epoch=1)


def shard(algorithm: str = "adamw_schedule_free", **changes: Any) -> Shard:
    document = {
        "optimizer": {"algorithm": algorithm},
        "parameters": [{"name": "w", "shape": [31]}, {"name": "v", "shape": [2, 3], "group": "other"}],
        "groups": {"other": {"lr": 0.5}},
        **changes,
    }
    made = Shard(RunSpec.model_validate(document), torch.device("cpu"))
    made.initialize(torch.randn(37, generator=torch.Generator().manual_seed(0)), epoch=1)
    return made


def advance(made: Shard, entries: int, batch: int = 1) -> None:
    """Applies entries whose gradients depend on their place alone."""
    for seq in range(made.seq + 1, made.seq + 1 + entries):
        gradient = torch.randn(37, generator=torch.Generator().manual_seed(seq))
        made.apply(Entry(seq, made.epoch, advance=seq % batch == 0, gradient=gradient, worker=f"w{seq}", weight=seq))


def points(made: Shard) -> list[torch.Tensor]:
    outs = [torch.empty(37) for _ in "xyz"]
    for point, out in zip("xyz", outs, strict=True):
        made.copy_point(point, out)  # type: ignore[arg-type]
    return outs


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_going_on_from_a_checkpoint_is_never_having_stopped(tmp_path: Path, algorithm: str, batch: int) -> None:
    aggregation = {"policy": "buffered", "batch": batch}
    straight, stopped, resumed = (shard(algorithm, aggregation=aggregation) for _ in range(3))
    advance(straight, 41, batch)
    advance(stopped, 10, batch)
    checkpoints = Checkpoints(tmp_path, keep=3)
    written = checkpoints.write(stopped.cut(), {"key": RECORD})
    assert (written.epoch, written.step) == (1, 10 // batch)
    loaded = checkpoints.newest()
    assert loaded is not None
    cut, receipts = loaded
    assert receipts == {"key": RECORD}
    resumed.load(cut, epoch=2)
    assert (resumed.epoch, resumed.position()) == (2, stopped.position())
    advance(resumed, 31, batch)
    assert (resumed.step, resumed.seq) == (straight.step, straight.seq)
    for mine, theirs in zip(points(resumed), points(straight), strict=True):
        assert torch.equal(mine, theirs)


def test_a_cut_does_not_move_with_the_shard() -> None:
    made = shard()
    advance(made, 3)
    cut = made.cut()
    kept = {name: tensor.clone() for name, tensor in cut.tensors.items()}
    advance(made, 3)
    assert all(torch.equal(cut.tensors[name], kept[name]) for name in kept)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=2)
    for _ in range(4):
        advance(made, 1)
        checkpoints.write(made.cut(), {})
    assert [each.step for each in checkpoints.all()] == [3, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_later_epoch_is_newer_than_a_later_step(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=5)
    advance(made, 5)
    checkpoints.write(made.cut(), {})
    early = shard()
    advance(early, 2)
    early.load(early.cut(), epoch=2)
    checkpoints.write(early.cut(), {})
    loaded = checkpoints.newest()
    assert loaded is not None
    assert (loaded[0].epoch, loaded[0].step) == (2, 2)


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_damaged_checkpoint_of_the_same_cut_is_written_anew(tmp_path: Path, name: str) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=5)
    checkpoints.write(made.cut(), {})
    (directory,) = tmp_path.iterdir()
    flip_a_bit(directory / name)
    assert checkpoints.write(made.cut(), {"key": RECORD}).step == 0
    assert checkpoints.at(0)[1] == {"key": RECORD}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_cut_twice_is_one_checkpoint(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=5)
    assert checkpoints.write(made.cut(), {}) == checkpoints.write(made.cut(), {})
    assert len(checkpoints.all()) == 1


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_skipped_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=5)
    for _ in range(2):
        advance(made, 1)
        checkpoints.write(made.cut(), {})
    damage(sorted(tmp_path.iterdir())[-1] / name)
    with caplog.at_level(logging.ERROR):
        loaded = checkpoints.newest()
    assert loaded is not None
    assert loaded[0].step == 1
    assert "is damaged and skipped" in caplog.text
    with pytest.raises(CheckpointNotFound):
        checkpoints.at(2)


def test_what_a_kill_left_behind_is_not_a_checkpoint(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=5)
    checkpoints.write(made.cut(), {})
    (tmp_path / ".00000001-000000000009-000000000009.1234").mkdir()
    assert [each.step for each in checkpoints.all()] == [0]
    assert checkpoints.newest() is not None
    checkpoints.write(made.cut(), {})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    made, checkpoints = shard(), Checkpoints(tmp_path, keep=1)
    checkpoints.write(made.cut(), {})
    advance(made, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            checkpoints.write(made.cut(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    loaded = checkpoints.newest()
    assert loaded is not None
    assert loaded[0].step == 0
    assert len(list(tmp_path.iterdir())) == 1


SAVER = """
import sys
from pathlib import Path
import torch
from freestep.models import RunSpec
from freestep_service.checkpoints import Checkpoints
from freestep_service.shard import Entry, Shard
spec = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [200_000]}]}
shard, checkpoints = Shard(RunSpec.model_validate(spec), torch.device("cpu")), Checkpoints(Path(sys.argv[1]), keep=2)
newest = checkpoints.newest()
if newest:
    shard.load(newest[0], epoch=1)
else:
    shard.initialize(torch.zeros(200_000), epoch=1)
while True:
    shard.apply(Entry(shard.seq + 1, 1, advance=True, gradient=torch.ones(200_000)))
    print(checkpoints.write(shard.cut(), {}).step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_a_newest_that_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, said = Checkpoints(tmp_path, keep=2), 0
    for count in (1, 4, 7):
        command = [sys.executable, "-c", SAVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            for _ in range(count):
                said = int(saver.stdout.readline())
            saver.kill()
        newest = checkpoints.newest()
        assert newest is not None
        assert newest[0].step >= said
    assert caplog.text == ""


def test_without_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.newest() is None
    assert checkpoints.all() == []
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 3"):
        checkpoints.at(3)


def test_a_run_file_is_read_back(tmp_path: Path) -> None:
    RunFile("{}", 3, 17).write(tmp_path / "run")
    assert RunFile.read(tmp_path / "run") == RunFile("{}", 3, 17)
    (tmp_path / "run" / "run.json").write_text("[1]")
    with pytest.raises((ValueError, TypeError)):
        RunFile.read(tmp_path / "run")


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
    while checkpoint_steps(api)[-1] != 5:
        pass
    while api.status()["checkpoint_step"] != 5:
        pass


def test_the_last_checkpoint_is_written_at_shutdown(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_service(tmp_path / "data")
    api = connect(service.url)
    api.create()
    api.push(api.lease(), 0, "key")
    service.stop()
    loaded = Checkpoints(tmp_path / "data" / "runs" / api.run / "checkpoints", keep=1).newest()
    assert loaded is not None
    assert loaded[0].step == 1
    assert loaded[1]["key"].decision == "applied"


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
    for directory in (tmp_path / "data" / "runs" / api.run / "checkpoints").iterdir():
        flip_a_bit(directory / "state.safetensors")
    answer = api.http.post(api.path("/checkpoints/0/restore"))
    assert answer.status_code == 404
    assert "is damaged" in answer.json()["detail"]
    assert api.status()["epoch"] == 1
