"""The tasks that look after runs: one run that hangs, or an error, holds up no other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep.errors import LeaseExpired, ShardUnavailable, StorageUnavailable
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs import checkpointing
from freestep_service.runs import registry as registry_module
from freestep_service.runs.run import Run
from in_process import (
    NUMEL,
    Medium,
    claim_of,
    lease_of,
    new_run,
    part_of,
    process,
    pull,
    push,
    run_async,
    spec_of,
    until,
    until_shared,
)


def test_a_run_that_hangs_while_it_opens_holds_up_no_other(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            await new_run(registry, "hangs")
        medium.hangs = "runs/hangs"
        monkeypatch.setattr(registry_module, "_OPENING_S", 0.1)
        async with AsyncExitStack() as stack:
            registry = await stack.enter_async_context(process(store, tmp_path / "data", storage=medium))
            stack.callback(medium.may_go_on.set)
            run = await new_run(registry, "goes-on", aggregation={"policy": "sync"})
            dies = await run.leases.grant("dies", 1000)
            stays = await run.leases.grant("stays", None)
            await push(run, claim_of(stays, "one"))
            # The update waits for the worker that dies, whose lease ends.
            assert (await pull(run.shard(0)))[0] == 0
            await until(lambda: run.shard(0).core.writer.applied_step == 1, "the end of the lease")
            with pytest.raises(LeaseExpired):
                await run.leases.release(dies.lease)
            assert (await registry.find("goes-on")) is run

    run_async(work)


def test_no_error_ends_the_housekeeping(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry)
            fails, calls = [True], [0]
            expire = run.leases.expire

            async def failing() -> None:
                calls[0] += 1
                if fails[0]:
                    raise KeyError("phase")
                await expire()

            # The keeper's own reference.
            monkeypatch.setattr(run._keeper._leases, "expire", failing)
            await until(lambda: calls[0] > 3, "a repetition")
            assert caplog.text.count("its leases: KeyError('phase')") == 1
            fails[0] = False
            await until(lambda: "its leases is looked after again" in caplog.text, "the end of the error")

    with caplog.at_level(logging.INFO, "freestep"):
        run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_that_is_complete_once_the_run_has_gone_back_puts_off_no_other(
    store: str, tmp_path: Path, shards: int
) -> None:
    """As where a shard is slow to write its part: what comes after the return is not in it."""

    async def work() -> None:
        async with process(store, tmp_path / "data", checkpoint_steps=1) as registry:
            run = await new_run(registry, shards=shards)
            for step in range(3):
                await push(run, claim_of(await lease_of(run), f"push-{step}", step))
                await until(lambda step=step: run._checkpointing.step == step + 1, "a checkpoint")  # type: ignore[misc]
            late, _ = run._checkpointing._written or (None, None)
            assert late is not None and late.step == 3
            await run.restore(1)
            await run._checkpointing.complete(late)
            assert (await run.status()).checkpoint_step == 1
            await push(run, claim_of(await lease_of(run), "another", 1))
            await until(lambda: run._checkpointing.step == 2, "a checkpoint of the new epoch", bound_s=10.0)

    run_async(work)


def test_a_checkpoint_whose_message_is_lost_is_known_by_the_next_heartbeat(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        media = [Medium(tmp_path / name) for name in ("one", "other")]
        async with two_owners(store, media) as (first, second):
            hears_of_no_checkpoint(first)
            await push_to(first, second)
            await second.checkpoint()
            await until(lambda: first._checkpointing.step == 1, "the checkpoint")
            await until(lambda: any(each.step == 1 for each in first._checkpoints.all()), "its completion")
            assert {(await each.status()).checkpoint_step for each in (first, second)} == {1}

    run_async(work)


def test_a_process_whose_part_could_not_be_written_takes_the_next_checkpoint_for_the_end_of_that(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_OTHERS_S", 0.1)

    async def work() -> None:
        media = [Medium(tmp_path / name) for name in ("one", "other")]
        async with two_owners(store, media, queue_seconds=0.1) as (first, second):
            await push_to(first, second)
            [medium] = [medium for medium in media if second._context.resources.storage is medium]
            medium.is_full = True
            with pytest.raises(ShardUnavailable):
                await first.checkpoint()
            await until(lambda: second.problem is not None, "the problem")
            medium.is_full = False
            await until(lambda: first._checkpointing.step == 1, "another attempt")
            await until(lambda: (first.problem, second.problem) == (None, None), "the end of the problem")

    run_async(work)


def test_a_checkpoint_that_failed_is_tried_again_where_nothing_has_happened_since(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_PAUSE_AFTER_FAILURE_S", 0.1)

    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=2)
            await push(run, claim_of(await lease_of(run), "one"))
            await run.checkpoint()
            medium.is_full = True
            with pytest.raises(StorageUnavailable):
                await run.checkpoint()
            assert run.problem is not None
            medium.is_full = False
            await until(lambda: run.problem is None, "another attempt")

    run_async(work)


@asynccontextmanager
async def two_owners(store: str, media: Sequence[Medium], **settings: Any) -> AsyncIterator[tuple[Run, Run]]:
    """A run of two shards at two processes with media of their own: at that which has the first, and at the other."""
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(
                process(store, medium.root, storage=medium, node_url=f"http://127.0.0.1:{number}", **settings)
            )
            for number, medium in enumerate(media)
        ]
        run, _ = await one.create("run", spec_of(2), ANYBODY)
        runs = [run, await other.find("run")]
        await until_shared(*runs)
        first, second = sorted(runs, key=lambda each: not each.owns(0))
        zeros = torch.zeros(NUMEL)
        await asyncio.gather(
            *(
                each.initialize(each.shard(index), part_of(each, index, zeros), "upload")
                for index, each in enumerate((first, second))
            )
        )
        yield first, second


async def push_to(first: Run, second: Run) -> None:
    """Pushes a gradient."""
    claim = claim_of(await lease_of(second), "one")
    await asyncio.gather(
        *(
            each.shard(index).push(claim, part_of(each, index, torch.zeros(NUMEL)))
            for index, each in enumerate((first, second))
        )
    )


def hears_of_no_checkpoint(run: Run) -> None:
    """Has a run lose the messages that a checkpoint is complete."""
    dispatch = run._ownership._dispatch
    take = dispatch.on_message

    def losing(message: dict[str, Any] | None) -> None:
        if message is None or message["kind"] != "durable":
            take(message)

    dispatch.on_message = losing  # type: ignore[method-assign]
