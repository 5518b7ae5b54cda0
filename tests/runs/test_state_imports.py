"""Imports of whole states that come to nothing: a run that changes hands, a medium that is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from freestep.api.control import RunControl
from freestep.api.run_state import StateDocument
from freestep.errors import IdempotencyConflict, InvalidSpec, ShardUnavailable, StorageUnavailable
from freestep.wire.state import encode_state_header
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.run import Run
from freestep_service.runs.state_imports import ImportTerms
from in_process import Bytes, Medium, claim_of, lease_of, new_run, process, pull, push, run_async, spec_of, until

TERMS = ImportTerms("an-import", replaces=True)
STEP = 7
DIGEST = "of-a-body"


async def hold(run: Run, value: float = 5.0, terms: ImportTerms = TERMS, **changed: Any) -> list[str]:
    """Has the owned shards hold their parts of a state of equal elements; their tokens."""
    return [await hold_part(run, index, value, terms, **changed) for index in range(run.count)]


async def hold_part(run: Run, index: int, value: float, terms: ImportTerms = TERMS, **changed: Any) -> str:
    document = StateDocument(
        spec=run.spec,
        step=STEP,
        buffers=("y", "momentum_buffer"),
        scalars={"default": {"k": STEP}},
        control=RunControl(**changed),
    )
    part = run.manifest.part(index, run.count)
    vectors = torch.cat([torch.full((part.numel,), value), torch.zeros(part.numel)])
    body = Bytes(encode_state_header(part, document) + vectors.numpy().tobytes())
    return await run.imports.receive_part(index, body, terms.attempt)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("fault", ["another-owner", "never-held"])
def test_a_part_that_its_owner_does_not_hold_changes_nothing(
    store: str, tmp_path: Path, shards: int, fault: str
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            memory = run._context.resources.memory
            free = memory.free
            tokens = await hold(run)
            assert memory.free < free
            if fault == "another-owner":
                tokens[-1] = "another"
            else:
                run.imports._held.drop(TERMS.attempt)
            with pytest.raises(ShardUnavailable):
                await run.imports.adopt(TERMS, STEP, DIGEST, tokens)
            await run.imports.forget(TERMS.attempt)
            assert memory.free == free
            await until(lambda: run.shard(0) is not None, "the run")
            outcomes = await push(run, claim_of(lease, "two", 1))
            assert {outcome.record.decision for outcome in outcomes} == {"applied"}
            assert [await pull(run.shard(index)) for index in range(shards)] == [(2, 2.0)] * shards
            assert run.epoch == 1

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_full_disk_refuses_an_import_before_anything_is_changed(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=shards)
            tokens = await hold(run)
            medium.is_full = True
            with pytest.raises(StorageUnavailable, match="No space left"):
                await run.imports.adopt(TERMS, STEP, DIGEST, tokens)
            assert (run.epoch, await pull(run.shard(0))) == (1, (0, 0.0))

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_import_whose_checkpoint_fails_says_so_and_is_written_when_it_is_sent_again(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=shards)
            tokens = await hold(run)
            # There is room for the probe, and none for the state.
            medium.require_writable = lambda: None  # type: ignore[method-assign]
            medium.is_full = True
            with pytest.raises(StorageUnavailable, match="No space left"):
                await run.imports.adopt(TERMS, STEP, DIGEST, tokens)
            assert await pull(run.shard(0)) == (STEP, 5.0)
            assert (await run.status()).checkpoint_step != STEP
            medium.is_full = False
            assert not await run.imports.is_wanted(TERMS)
            await run.imports.require_durable()
            assert (await run.list_checkpoints())[-1].step == STEP
            await push(run, claim_of(await lease_of(run), "next", STEP))
            assert await pull(run.shard(0)) == (STEP + 1, 6.0)

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_state_that_failed_to_load_does_not_outlive_the_failure(store: str, tmp_path: Path, shards: int) -> None:
    """A shard that has lost its part returns the run to its newest checkpoint, as any loss of a shard does."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            await push(run, claim_of(await run.leases.grant("worker", None), "one"))
            await run.checkpoint()
            tokens = await hold(run)
            take = run.imports._held.take
            run.imports._held.take = lambda upload, index: None if index == shards - 1 else take(upload, index)  # type: ignore[method-assign]
            with pytest.raises(ShardUnavailable):
                await run.imports.adopt(TERMS, STEP, DIGEST, tokens)
            assert [await pull(run.shard(index)) for index in range(shards)] == [(1, 1.0)] * shards
            # It was not made: sent again, it is.
            run.imports._held.take = take  # type: ignore[method-assign]
            assert await run.imports.is_wanted(TERMS)
            await run.imports.adopt(TERMS, STEP, DIGEST, await hold(run))
            assert [await pull(run.shard(index)) for index in range(shards)] == [(STEP, 5.0)] * shards
            assert not await run.imports.is_wanted(TERMS)

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_state_whose_changes_take_more_memory_than_is_free_is_refused(
    store: str, tmp_path: Path, shards: int
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            memory, gathering = run._context.resources.memory, {"policy": "buffered", "batch": 4}
            free = memory.free
            tokens = await hold(run, aggregation=gathering)
            left = memory.free
            memory.total -= left
            with pytest.raises(InvalidSpec):
                await run.imports.adopt(TERMS, STEP, DIGEST, tokens)
            memory.total += left
            await run.imports.forget(TERMS.attempt)
            assert (run.epoch, await pull(run.shard(0)), memory.free) == (1, (0, 0.0), free)
            await run.imports.adopt(TERMS, STEP, DIGEST, await hold(run, aggregation=gathering))
            assert (await run.status()).control.aggregation == gathering
            assert memory.free < free

    run_async(work)


def test_of_two_requests_with_one_key_the_run_takes_one_whole(store: str, tmp_path: Path) -> None:
    first, second = (ImportTerms("one-key", replaces=True) for _ in range(2))

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=2)
            free = run._context.resources.memory.free
            tokens = [await hold_part(run, 0, 5.0, first)]
            for index in range(2):
                await hold_part(run, index, 6.0, second)
            tokens.append(await hold_part(run, 1, 5.0, first))
            await run.imports.adopt(first, STEP, DIGEST, tokens)
            assert [await pull(run.shard(index)) for index in range(2)] == [(STEP, 5.0)] * 2
            await run.imports.adopt(second, STEP, DIGEST, tokens)
            with pytest.raises(IdempotencyConflict):
                await run.imports.adopt(second, STEP, "of-another", tokens)
            # A process of version 0.1.0 notes its imports without a digest.
            await run._context.resources.store.client.hset(f"freestep:{{{run.name}}}:run", "upload", "by-another")  # type: ignore[misc]
            await run.imports.adopt(ImportTerms("by-another", replaces=True), STEP, "of-another", tokens)
            assert [await pull(run.shard(index)) for index in range(2)] == [(STEP, 5.0)] * 2
            for terms in first, second:
                await run.imports.forget(terms.attempt)
            assert run._context.resources.memory.free == free

    run_async(work)


def test_every_owner_gives_back_the_parts_of_an_import_that_is_over(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        data = tmp_path / "data"
        async with process(store, data) as one, process(store, data, node_url="http://127.0.0.1:2") as other:
            run, _ = await one.create("run", spec_of(2), ANYBODY)
            there = await other.find(run.name)
            await until(
                lambda: any(shard.core.loaded is not None for shard in there._shards), "the other process's shard"
            )
            [index] = there._shards.indices
            memory, free = other._resources.memory, other._resources.memory.free
            await hold_part(there, index, 5.0)
            assert memory.free < free
            await run.imports.forget(TERMS.attempt)
            await until(lambda: memory.free == free, "the memory of the part")

    run_async(work)
