"""Journaled runs on disks that are full or fail: what is acknowledged is there, and all else is refused."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from freestep.api.models import RunSpec
from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.tokens import ANYBODY
from in_process import Bytes, Medium, claim_of, new_run, process, pull, push, run_async
from losing_disk import LosingDisk
from plain_calls import SGD
from runs.journaled import crashed, is_same, opened, states
from small_disk import small_disk


def test_without_a_first_checkpoint_nothing_is_acknowledged(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium, queue_seconds=0.2) as registry:
            spec = RunSpec.model_validate(
                {"optimizer": SGD, "parameters": [{"name": "w", "shape": [8]}], "durability": "journal"}
            )
            run, _ = await registry.create("run", spec, ANYBODY)
            medium.is_full = True
            zeros = Bytes(safetensors.torch.save({"w": torch.zeros(8)}))
            with pytest.raises(StorageUnavailable):
                await run.initialize(run.shard(0), zeros, "upload")
            lease = await run.leases.grant("worker", None)
            with pytest.raises(StorageUnavailable, match="no checkpoint yet"):
                await push(run, claim_of(lease, "one"))
            assert (await run.status()).step == 0
            medium.is_full = False
            await run.checkpoint()
            (outcome,) = await push(run, claim_of(lease, "one"))
            assert (outcome.record.step, outcome.replayed) == (1, False)

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_full_disk_refuses_pushes_before_they_count_and_they_go_on_when_there_is_room(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", journal_dir=disk) as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            # What was allocated may still be used.
            step = 1
            with pytest.raises(StorageUnavailable, match="No space left on device"):
                while step < 10_000:
                    await push(run, claim_of(lease, f"key-{step}", step))
                    step += 1
            assert (await run.status()).step == step
            assert (await pull(run.shard(0)))[0] == step
            filler.unlink()
            await push(run, claim_of(lease, f"key-{step}", step))
            assert (await run.status()).step == step + 1
            assert (await pull(run.shard(0)))[1] == step + 1

    with small_disk(tmp_path / "small", kib=3072) as disk:
        run_async(work, 120.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_disk_has_lost_is_not_acknowledged_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    disk = LosingDisk(monkeypatch)

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "key-0", 0))
            disk.failures = 1
            with pytest.raises((StorageUnavailable, ShardUnavailable)):
                await push(run, claim_of(lease, "key-1", 1))
            # It is opened again by itself, and the same key has the push counted once.
            while True:
                with suppress(ShardUnavailable, StorageUnavailable):
                    await push(run, claim_of(lease, "key-1", 1))
                    break
                await asyncio.sleep(0.01)
            before = await states(run)
            status = await run.status()
            assert (status.epoch, status.step) == (1, 2)
            image = tmp_path / "power"
            shutil.copytree(tmp_path / "data", image)
            shutil.rmtree(image / "journal")
            disk.after_power_failed(tmp_path / "data" / "journal", image / "journal")
            async with crashed(tmp_path, image) as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)
