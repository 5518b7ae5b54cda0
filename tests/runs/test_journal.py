"""Runs whose pushes are journaled: what was acknowledged is there after a crash, to the bit, in the same epoch.

A crash is an image of the service's directory, taken while it runs, that another process opens with a Redis that knows
nothing; or a process that is killed, with its Redis or without it.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from redis import Redis
from torch import Tensor

from encoded import assemble, int8, topk
from freestep.api.data import DataSpec
from freestep.api.models import MetricReport, RunSpec
from freestep.errors import LeaseExpired, ShardUnavailable
from freestep.wire.receiver import Receiver
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs import pushes
from freestep_service.runs.resources import Disk
from freestep_service.runs.shard_journal import ShardJournal
from freestep_service.storage.journal_files import segment_paths
from freestep_service.storage.journal_format import Kind
from harness import ProcessService, ThreadService
from in_process import Bytes, claim_of, lease_of, new_run, process, push, run_async, until
from meanwhile import wait_until
from plain_calls import SGD, TENSORS, Api
from raw_pushes import answered, connected, head_of_a_push, is_pending
from run_specs import POLICIES
from runs.journaled import crashed, is_same, journal_dirs, journaled_run, last_entry, opened, states
from storage.journals import BASE, claim, frame_places

SHAPES = {"a": [3, 5], "b": [], "c": [700]}


@pytest.mark.parametrize("shards", [1, 3])
def test_after_a_crash_that_took_redis_too_it_goes_on_from_the_very_bits(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, lease = await journaled_run(registry, 5, shards)
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


def test_after_an_orderly_stop_nothing_is_said_to_be_replayed(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            await journaled_run(registry, 5)
        caplog.clear()
        async with process(store, tmp_path / "data") as registry:
            run, _ = await opened(registry)
            assert (await run.status()).step == 5
        assert "replayed" not in caplog.text

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


def test_a_body_that_comes_slowly_does_not_keep_what_came_behind_it(store: str, tmp_path: Path) -> None:
    numel = 300_000
    spec = RunSpec.model_validate(
        {
            "optimizer": SGD,
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [numel]}],
            "durability": "journal",
        }
    )
    whole = safetensors.torch.save({"w": torch.ones(numel)})

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, _ = await registry.create("run", spec, ANYBODY)
            await run.initialize(run.shard(0), Bytes(whole), "upload")
            lease, slow = await run.leases.grant("worker", None), await run.leases.grant("slow", None)
            journal, gate = run.shard(0).core.journal, asyncio.Event()
            assert journal is not None
            body = Beginning(whole, gate)
            pushing = asyncio.create_task(run.shard(0).push(claim_of(slow, "slow"), body))
            await body.began.wait()
            step = 0
            for _ in range(4):
                for _ in range(3):
                    await run.shard(0).push(claim_of(lease, f"key-{step}", step), Bytes(whole))
                    step += 1
                await run.checkpoint()
            await until(lambda: journal.size < 6 * len(whole), "the journal is cut")
            assert not pushing.done()
            gate.set()
            assert (await pushing).record.step == step + 1
            before = await states(run)
            async with crashed(tmp_path, tmp_path / "data") as other:
                again, _ = await opened(other)
                assert all(map(is_same, await states(again), before))

    run_async(work)


class Beginning(Bytes):
    """A body that says when it begins to come."""

    def __init__(self, content: bytes, gate: asyncio.Event) -> None:
        super().__init__(content, gate)
        self.began = asyncio.Event()

    async def receive_into(self, receiver: Receiver) -> str:
        self.began.set()
        return await super().receive_into(receiver)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_push_that_is_lost_and_does_not_come_again_keeps_it_no_longer_than_to_the_next_checkpoint(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(pushes, "SILENCE_S", 0.05)

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run, lease = await journaled_run(registry, 2, shards)
            core, journal = run.shard(0).core, run.shard(0).core.journal
            assert journal is not None
            for number in range(3):
                part, gate = run.manifest.part(0, shards), asyncio.Event()
                body = Beginning(safetensors.torch.save({"w": torch.ones(part.numel)}), gate)
                lost = asyncio.create_task(run.shard(0).push(claim_of(lease, f"lost-{number}", 2 + number), body))
                await body.began.wait()
                # While the body comes, the run is opened again, which forgets that the push was admitted.
                generation = core.loaded
                run._recovery.reopen("Redis was away")
                await until(lambda generation=generation: core.loaded != generation, "the opening")  # type: ignore[misc]
                await lease_of(run, "another")
                gate.set()
                with pytest.raises((ShardUnavailable, LeaseExpired)):
                    await lost
                # Another shard may know of it.
                assert (journal.find(f"lost-{number}") is not None) == (shards > 1)
                kept = segment_paths(journal.directory)[-1]
                await push(run, claim_of(lease, f"next-{number}", 2 + number))
                await run.checkpoint()
                await journal.flush()
                assert journal.find(f"lost-{number}") is None
                assert kept not in segment_paths(journal.directory)
                assert len(segment_paths(journal.directory)) == 1

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
        part = frame_places(path, Kind.PART)[-1]
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


def test_a_push_that_comes_while_its_run_is_deleted_is_answered(api: Api, service: ThreadService) -> None:
    tensors = {"w": torch.zeros(500_000)}
    spec = api.spec(durability="journal", parameters=[{"name": "w", "shape": [500_000]}])
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize(tensors).status_code == 201
    body, middle = safetensors.torch.save(tensors), 1_000_000
    head = head_of_a_push(api.path("/gradients"), api.headers(api.lease(), 0, "late"), len(body))
    with connected(api.url) as connection:
        connection.sendall(head + body[:middle])
        wait_until(lambda: is_pending(service, api, "late"))
        assert api.http.delete(api.path()).status_code == 204
        connection.sendall(body[middle:])
        assert b"urn:freestep:problem:run-not-found" in answered(connection)


def test_room_is_given_back_where_a_push_has_left_before_it_was_there(tmp_path: Path) -> None:
    async def work() -> None:
        length, disk = 8 * 1024**2, Disk()
        journal = ShardJournal(tmp_path / "run" / "000000000000000-000000000000008", "run", "id", disk)
        await journal.begin(1, BASE, 100)
        asking = asyncio.create_task(journal.part(claim("left"), length, 30.0))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await journal.flush()
        ((_, segment),) = segment_paths(journal.directory)
        allocated = segment.stat().st_size
        assert allocated > length
        # It needs no more than the other did.
        (await journal.part(claim("another"), length, 30.0)).abandon()
        await journal.flush()
        assert segment.stat().st_size == allocated
        await journal.close()
        disk.close()

    run_async(work)
