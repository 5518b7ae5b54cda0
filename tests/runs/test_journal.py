"""Runs whose pushes are journaled: what was acknowledged is there after a crash, to the bit, in the same epoch.

A crash is an image of the service's directory, taken while it runs, that another process opens with a Redis that knows
nothing; or a process that is killed, with its Redis or without it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from redis import Redis
from torch import Tensor

from encoded import assemble, int8, topk
from freestep.api.data import DataSpec
from freestep.api.models import Lease, MetricReport, RunSpec
from freestep.errors import FreestepError, ShardUnavailable, StorageUnavailable
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.tokens import ANYBODY
from freestep_service.journal_command import main
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.state.shard import StateCopy
from freestep_service.storage.journal_files import frames, segment_paths
from freestep_service.storage.journal_format import Frame, Kind
from freestep_service.storage.journal_repair import discard, repair
from harness import ProcessService
from harness import store as own_store
from in_process import Bytes, Medium, claim_of, lease_of, new_run, process, pull, push, run_async, until
from losing_disk import LosingDisk
from meanwhile import wait_until
from plain_calls import SGD, TENSORS, Api
from run_specs import POLICIES
from small_disk import small_disk

SHAPES = {"a": [3, 5], "b": [], "c": [700]}


def journal_dirs(data_dir: Path) -> list[Path]:
    """The directories of a run's journals, by shard."""
    (run,) = (data_dir / "journal").iterdir()
    return sorted(run.iterdir())


def last_entry(directory: Path) -> tuple[Path, Frame]:
    """The newest entry of a journal, and the segment that it is in."""
    found = [
        (path, frame)
        for _, path in segment_paths(directory)
        for frame in frames(path)
        if isinstance(frame, Frame) and frame.kind == Kind.ENTRY
    ]
    return found[-1]


DAMAGE = {"an entry": Kind.ENTRY, "the head of a body": Kind.PART, "the values of a body": Kind.PART}


def break_frame(directory: Path, damage: str, number: int) -> None:
    """Flips a bit of an entry, or of the body of a push, in the newest segment."""
    path, _ = last_entry(directory)
    frame = [each for each in frames(path) if isinstance(each, Frame) and each.kind == DAMAGE[damage]][number]
    # The head of a body follows eight bytes with its length.
    place = {"an entry": frame.at + 45, "the head of a body": frame.body + 8, "the values of a body": frame.end - 1}
    broken = bytearray(path.read_bytes())
    broken[place[damage]] ^= 1
    path.write_bytes(broken)


def journal_command(data_dir: Path, *arguments: str) -> int:
    """Runs `freestep journal`; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--data-dir", str(data_dir)])
    return int(ended.value.code or 0)


async def states(run: Run) -> list[StateCopy]:
    shards = [run.shard(index) for index in range(run.count)]
    return [await shard.core.writer.run(shard.core.shard.copy_state) for shard in shards]


def is_same(one: StateCopy, other: StateCopy) -> bool:
    """Whether two states are the same to the bit."""
    plain = (
        "epoch",
        "step",
        "seq",
        "scalars",
        "group",
        "weight",
        "damping",
        "reported",
        "loss",
        "norm_history",
        "data",
    )
    return all(getattr(one, name) == getattr(other, name) for name in plain) and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


async def opened(registry: Registry) -> tuple[Run, Lease]:
    """The run, once it is open, and a lease of it."""
    run = await registry.find("run")
    return run, await lease_of(run, "opener")


@asynccontextmanager
async def crashed(tmp_path: Path, data_dir: Path, **settings: Any) -> AsyncIterator[Registry]:
    """A process on an image of another's directory, with a Redis that knows nothing."""
    image = Path(shutil.copytree(data_dir, tmp_path / f"image-{random.randrange(10**9)}"))
    (image / "redis").mkdir()
    with own_store("valkey", image / "redis") as url:
        async with process(url, image, **settings) as registry:
            yield registry


@pytest.mark.parametrize("shards", [1, 3])
def test_after_a_crash_that_took_redis_too_it_goes_on_from_the_very_bits(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            for step in range(5):
                await push(run, claim_of(lease, f"key-{step}", step), -1.0 - step)
            await run.reports.report(MetricReport(name="loss", step=4, value=0.25))
            assert await run.data.create(NewDataSet("train", DataSpec(length=100, unit=10)))
            # What is acknowledged is in the image, and so is what was there before.
            assert not await run.data.create(NewDataSet("train", DataSpec(length=100, unit=10)))
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                run, fresh = await opened(other)
                assert all(map(is_same, await states(run), before))
                status = await run.status()
                assert (status.epoch, status.step, status.pushes["applied"]) == (1, 5, 5)
                assert status.metrics["loss"].value == 0.25
                assert (await run.data.status("train")).spec.length == 100
                # A retry of what was acknowledged finds its receipt, and moves nothing.
                assert all(outcome.replayed for outcome in await push(run, claim_of(lease, "key-4", 4), -5.0))
                assert all(map(is_same, await states(run), before))
                await push(run, claim_of(fresh, "key-5", 5))
                assert (await run.status()).step == 6

    run_async(work)


def gradient(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def body_of(seed: int) -> bytes:
    """A gradient in one of the encodings."""
    tensors = gradient(seed)
    match seed % 5:
        case 0:
            return safetensors.torch.save(tensors)
        case 1:
            return safetensors.torch.save({name: each.bfloat16() for name, each in tensors.items()})
        case 2:
            return assemble(*int8(tensors))
        case 3:
            return assemble(*topk(tensors, 0.1))
    return safetensors.torch.save({name: each.half() if name == "a" else each for name, each in tensors.items()})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("robust", [{}, {"robust": "clip", "clip_factor": 1.0, "outlier_factor": 1.2}])
def test_every_policy_and_encoding_comes_back_to_the_bit(
    store: str, tmp_path: Path, policy: str, robust: dict[str, Any]
) -> None:
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.05, "max_grad_norm": 5.0},
            "aggregation": {"policy": policy, **POLICIES[policy], **robust},
            "parameters": [{"name": name, "shape": shape} for name, shape in SHAPES.items()],
            "durability": "journal",
        }
    )

    async def work() -> None:
        # Bodies that are written while they come, too.
        async with process(store, tmp_path / "data") as registry:
            run, _ = await registry.create("run", spec, ANYBODY)
            await run.initialize(run.shard(0), Bytes(safetensors.torch.save(gradient(99))), "upload")
            leases = [await run.leases.grant(f"worker-{number}", None) for number in range(3)]
            choose = random.Random(7)
            for number in range(20):
                step = (await run.status()).step
                lease, late = leases[number % 3], choose.choice([0, 0, 1])
                claim = claim_of(lease, f"key-{number}", max(step - late, 0))
                await run.shard(0).push(claim, Bytes(body_of(number)))
                if number == 11:
                    await run.checkpoint()
                if number == 15:
                    await run.leases.release(leases[2].lease)
                    leases[2] = await run.leases.grant("worker-2", None)
                if number in (4, 12, 19):
                    before = await states(run)
                    async with crashed(tmp_path, tmp_path / "data") as other:
                        again, _ = await opened(other)
                        assert all(map(is_same, await states(again), before))
                        pushes = (await again.status()).pushes
                        assert pushes["applied"] == (await run.status()).pushes["applied"]

    run_async(work, 120.0)


def test_a_large_body_is_written_while_it_comes(store: str, tmp_path: Path) -> None:
    tensors = {"w": torch.arange(700_000, dtype=torch.float32)}
    spec = RunSpec.model_validate(
        {
            "optimizer": SGD,
            "parameters": [{"name": "w", "shape": [700_000]}],
            "durability": "journal",
        }
    )

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, _ = await registry.create("run", spec, ANYBODY)
            await run.initialize(run.shard(0), Bytes(safetensors.torch.save(tensors)), "upload")
            lease = await run.leases.grant("worker", None)
            gate = asyncio.Event()
            body = safetensors.torch.save(tensors)
            coming = asyncio.ensure_future(run.shard(0).push(claim_of(lease, "one"), Bytes(body, gate)))
            (directory,) = journal_dirs(tmp_path / "data")

            def on_disk() -> int:
                return max(
                    (path.read_bytes().rfind(body[len(body) // 4 :][:64]) for _, path in segment_paths(directory))
                )

            await until(lambda: on_disk() > 0, "the first half of the body")
            gate.set()
            await coming
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


def test_it_is_cut_behind_checkpoints_and_a_long_one_brings_the_next_forward(store: str, tmp_path: Path) -> None:
    spec = RunSpec.model_validate(
        {"optimizer": SGD, "parameters": [{"name": "w", "shape": [70_000]}], "durability": "journal"}
    )
    body = safetensors.torch.save({"w": torch.ones(70_000)})

    async def work() -> None:
        async with process(store, tmp_path / "data", journal_max_bytes=1024**2) as registry:
            run, _ = await registry.create("run", spec, ANYBODY)
            await run.initialize(run.shard(0), Bytes(body), "upload")
            lease = await run.leases.grant("worker", None)
            for step in range(30):
                await run.shard(0).push(claim_of(lease, f"key-{step}", step), Bytes(body))
            journal = run.shard(0).core.journal
            assert journal is not None
            await until(lambda: journal.size < 2 * 1024**2, "a checkpoint that cuts the journal")
            checkpoints = await run.list_checkpoints()
            assert checkpoints[-1].step > 0
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


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


def test_damage_is_refused_until_it_is_repaired(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, durability="journal")
            lease = await run.leases.grant("worker", None)
            for step in range(3):
                await push(run, claim_of(lease, f"key-{step}", step))
            (directory,) = journal_dirs(tmp_path / "data")
            path, newest = last_entry(directory)
            whole = path.read_bytes()
            broken = bytearray(whole)
            broken[next(f for f in frames(path) if isinstance(f, Frame) and f.kind == Kind.ENTRY).at + 45] ^= 1
            assert newest.at > 0
            path.write_bytes(broken)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again = await other.find("run")
                await until(lambda: again.problem is not None, "the problem")
                assert "is damaged" in (again.problem or "")
                assert "freestep journal repair" in (again.problem or "")
                with pytest.raises(FreestepError):
                    await again.leases.grant("worker", None)
            path.write_bytes(whole)

    run_async(work)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_refused_journal_is_not_read_again_until_it_changes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    opened_segments: list[Path] = []
    os_open = os.open

    def counting(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".journal"):
            opened_segments.append(Path(path))
        return os_open(path, *arguments, **options)

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, durability="journal")
            lease = await run.leases.grant("worker", None)
            for step in range(3):
                await push(run, claim_of(lease, f"key-{step}", step))
            image = shutil.copytree(tmp_path / "data", tmp_path / "image")
        (directory,) = journal_dirs(image)
        break_frame(directory, damage, 1)
        (image / "redis").mkdir()
        with own_store("valkey", image / "redis") as url:
            async with process(url, image) as registry:
                again = await registry.find("run")
                await until(lambda: again.problem is not None, "the problem")
                monkeypatch.setattr(os, "open", counting)
                for _ in range(3):
                    await again.refresh()
                    assert "freestep journal repair" in (again.problem or "")
                assert opened_segments == []
                assert len(segment_paths(directory)) <= 2
                await asyncio.to_thread(repair, directory)
                _, lease = await opened(registry)
                assert (await again.status()).step == 1
                assert opened_segments

    run_async(work)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_running_service_goes_on_with_what_a_repair_has_kept(store: str, tmp_path: Path, damage: str) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, durability="journal")
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "key-0", 0))
            before = await states(run)
            for step in (1, 2):
                await push(run, claim_of(lease, f"key-{step}", step))
            (directory,) = journal_dirs(tmp_path / "data")
            path, _ = last_entry(directory)
            whole = path.read_bytes()
            break_frame(directory, damage, 1)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again = await other.find("run")
                await until(lambda: again.problem is not None, "the problem")
                assert "freestep journal repair" in (again.problem or "")
                (image,) = tmp_path.glob("image-*")
                (damaged,) = journal_dirs(image)
                done = await asyncio.to_thread(repair, damaged)
                assert done is not None and done.aside
                await until(lambda: again.problem is None, "the run without the problem")
                fresh = await lease_of(again, "fresh")
                weights = [each.tensors for each in await states(again)]
                assert all(torch.equal(weights[0][name], before[0].tensors[name]) for name in weights[0])
                status = await again.status()
                assert (status.epoch, status.step) == (2, 1)
                await push(again, claim_of(fresh, "new", 1))
                assert (await again.status()).step == 2
            path.write_bytes(whole)

    run_async(work)


@pytest.mark.parametrize("is_redis_lost", [False, True], ids=["", "redis too"])
@pytest.mark.parametrize(
    ("shards", "act", "kept"),
    [(1, "repair", 3), (2, "repair", 4), (3, "repair", 4), (2, "discard", 2), (2, "discard all", 2)],
)
def test_after_a_repair_of_one_shard_all_go_on_at_the_newest_step_that_all_have(
    store: str, tmp_path: Path, shards: int, act: str, kept: int, is_redis_lost: bool
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            expected: list[list[StateCopy]] = [await states(run)]
            for step in range(6):
                await push(run, claim_of(lease, f"key-{step}", step), -1.0 - step)
                await run.reports.report(MetricReport(name="loss", step=step, value=float(step)))
                expected.append(await states(run))
                if step == 1:
                    await run.checkpoint()
            image = shutil.copytree(tmp_path / "data", tmp_path / "image")
        directories = journal_dirs(image)
        if act == "repair":
            # The entry of the push of step 4.
            break_frame(directories[-1], "an entry", 2)
            assert journal_command(image, "repair", "run") == 0
        elif act == "discard":
            assert discard(directories[1]) is not None
        else:
            assert journal_command(image, "repair", "run", "--discard") == 0
        (tmp_path / "empty").mkdir()
        with own_store("valkey", tmp_path / "empty") as empty:
            async with process(empty if is_redis_lost else store, image) as registry:
                again, fresh = await opened(registry)
                status = await again.status()
                assert (status.epoch, status.step) == (2, kept)
                weights = [each.tensors for each in await states(again)]
                assert all(
                    torch.equal(one[name], other.tensors[name])
                    for one, other in zip(weights, expected[kept], strict=True)
                    for name in one
                )
                # What was given up may be sent again, and what is kept was counted once.
                await push(again, claim_of(fresh, "key-9", kept))
                assert (await again.status()).step == kept + 1
                before = await states(again)
                async with crashed(tmp_path, image) as other:
                    last, _ = await opened(other)
                    assert last.epoch == 2
                    assert all(map(is_same, await states(last), before))

    run_async(work, 120.0)


@pytest.mark.parametrize("shards", [1, 2])
def test_journals_that_are_given_up_beside_their_service_bring_it_back_to_its_checkpoint(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            for step in range(3):
                await push(run, claim_of(lease, f"key-{step}", step))
            for directory in journal_dirs(tmp_path / "data"):
                assert discard(directory) is not None
            with pytest.raises(FreestepError):
                await push(run, claim_of(lease, "key-3", 3))
            await until(lambda: run.epoch == 2, "the new epoch")
            lease = await lease_of(run)
            # Through all numbers that segments had before.
            for step in range(3):
                await push(run, claim_of(lease, f"new-{step}", step))
                for index in range(run.count):
                    journal = run.shard(index).core.journal
                    assert journal is not None
                    journal.mark()
            status = await run.status()
            assert (status.epoch, status.step) == (2, 3)
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_journal_that_goes_beside_its_service_is_waited_for(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, durability="journal")
            lease = await run.leases.grant("worker", None)
            for step in range(3):
                await push(run, claim_of(lease, f"key-{step}", step))
            before = await states(run)
            # As a disk that is not mounted any more.
            journals, elsewhere = tmp_path / "data" / "journal", tmp_path / "elsewhere"
            journals.rename(elsewhere)
            with pytest.raises(FreestepError):
                await push(run, claim_of(lease, "key-3", 3))
            await until(lambda: "its files are gone" in (run.problem or ""), "the problem")
            assert run.epoch == 1
            shutil.rmtree(journals, ignore_errors=True)
            elsewhere.rename(journals)
            await until(lambda: run.problem is None, "the run without the problem")
            await lease_of(run, "opener")
            # It may have been decided, and written to a file that was open.
            await push(run, claim_of(lease, "key-3", 3))
            assert (run.epoch, (await run.status()).step) == (1, 4)
            assert [each.seq for each in await states(run)] == [each.seq + 1 for each in before]

    run_async(work)


def test_another_run_of_the_name_does_not_read_it(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, durability="journal")
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            kept = shutil.copytree(tmp_path / "data" / "journal", tmp_path / "kept")
            await registry.delete("run")
            assert not list((tmp_path / "data" / "journal").iterdir())
            shutil.copytree(kept, tmp_path / "data" / "journal", dirs_exist_ok=True)
            run = await new_run(registry, durability="journal")
            assert (await run.status()).step == 0
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


def test_another_number_of_shards_has_journals_of_its_own(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=1, durability="journal")
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            await run.reshard(2)
            assert len(journal_dirs(tmp_path / "data")) == 2
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "two", 1))
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))
            await run.restore((await run.list_checkpoints())[-1].step)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "three", 1))
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))
                assert again.epoch == run.epoch == 3

    run_async(work)


def moved(api: Api) -> int:
    """How many gradients of TENSORS have been subtracted."""
    x, _ = api.pull("x")
    return round(1 - x["b"].item() / TENSORS["b"].item())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nothing", "redis", "entry", "push"])
def test_after_a_kill_every_push_has_moved_it_once(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], redis_url: str, loss: str
) -> None:
    service = start_process(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, durability="journal")
    lease = api.lease()
    for step in range(4):
        assert api.push(lease, step, f"key-{step}").json()["step"] == step + 1
    service.kill()
    (directory,) = journal_dirs(service.data_dir)
    path, entry = last_entry(directory)
    if loss == "redis":
        with Redis.from_url(redis_url) as redis:
            redis.flushall()
    elif loss == "entry":
        # As if the process had died before it was on disk: Redis still knows of it.
        path.write_bytes(path.read_bytes()[: entry.at])
    elif loss == "push":
        # Nobody was answered: its worker sends it again.
        part = [frame for frame in frames(path) if isinstance(frame, Frame) and frame.kind == Kind.PART][-1]
        path.write_bytes(path.read_bytes()[: part.at])
    service.start()
    # A Redis that has lost its data hears first who else is there.
    expected = 3 if loss == "push" else 4
    # While it replays, the step is one before; and leases are granted when the run is open.
    wait_until(lambda: api.http.post(api.path("/leases"), json={"worker": "another"}).status_code == 201)
    assert (api.status()["epoch"], api.status()["step"]) == (1, expected)
    if loss == "redis":
        fresh = api.lease()
        assert fresh["token"] > lease["token"]
        lease = {**fresh}
    again = api.push(lease, 3, "key-3").json() if loss != "redis" else None
    if again is not None:
        assert (again["step"], again["replayed"]) == (4, loss != "push")
    assert moved(api) == 4
    assert api.push(lease, 4, "key-4").json()["step"] == 5
    assert moved(api) == 5


@pytest.mark.slow
def test_a_run_whose_journal_is_gone_goes_back_to_its_checkpoint_only_where_that_is_said(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create(optimizer=SGD, durability="journal")
    lease = api.lease()
    for step in range(3):
        api.push(lease, step)
    service.kill()
    journal = service.data_dir / "journal"
    journal.rename(tmp_path / "unmounted")
    service.start(503)
    answer = api.http.get("/readyz").json()
    assert "start the service" in answer["detail"]
    service.kill()
    shutil.copytree(tmp_path / "unmounted", journal, dirs_exist_ok=True)
    service.start()
    assert (api.status()["epoch"], api.status()["step"]) == (1, 3)
    service.kill()
    shutil.rmtree(journal)
    service.start(journal_wait_seconds=0)
    assert (api.status()["epoch"], api.status()["step"]) == (2, 0)
