"""Checkpoints of runs that are served: when they are written, and what going back to one comes to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from checkpointed import flip_a_bit
from freestep_service.storage.checkpoints import Checkpoints
from freestep_service.storage.media import LocalStorage
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import TENSORS, Api


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
