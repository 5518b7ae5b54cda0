"""Runs on a medium that becomes full: what is refused changes nothing, and does not happen later."""

from __future__ import annotations

from pathlib import Path

import pytest

from freestep.errors import StorageUnavailable
from freestep_service.domain.tokens import ANYBODY
from in_process import (
    Medium,
    claim_of,
    initialize,
    lease_of,
    new_run,
    process,
    pull,
    push,
    run_async,
    spec_of,
)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_upload_does_not_fail_for_its_first_checkpoint(store: str, tmp_path: Path, shards: int) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run, _ = await registry.create("run", spec_of(shards), ANYBODY)
            medium.is_full = True
            await initialize(run)
            assert run.problem is not None and "No space left" in run.problem
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            with pytest.raises(StorageUnavailable):
                await run.checkpoint()
            medium.is_full = False
            assert (await run.checkpoint()).step == 1
            assert run.problem is None

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("what", ["restore", "reshard", "create", "delete"])
def test_what_a_full_disk_refuses_changes_nothing_and_does_not_happen_later(
    store: str, tmp_path: Path, shards: int, what: str
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=shards)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            await run.checkpoint()
            await push(run, claim_of(lease, "two", 1))
            medium.is_full = True
            calls = {
                "restore": lambda: run.restore(1),
                "reshard": lambda: run.reshard(shards + 1),
                "create": lambda: registry.create("other", spec_of(1), ANYBODY),
                "delete": lambda: registry.delete("run"),
            }
            with pytest.raises(StorageUnavailable, match="No space left"):
                await calls[what]()
            outcomes = await push(run, claim_of(lease, "three", 2))
            assert {outcome.record.decision for outcome in outcomes} == {"applied"}
            medium.is_full = False
            await run.refresh()
            assert (run.epoch, run.count) == (1, shards)
            assert [await pull(run.shard(index)) for index in range(shards)] == [(3, 3.0)] * shards
            assert [each.name for each in registry.all()] == ["run"]

    run_async(work)


def test_a_division_that_runs_out_of_disk_is_given_up(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=2)
            lease = await run.leases.grant("worker", None)
            await push(run, claim_of(lease, "one"))
            # There is room for the probe, and none for the state.
            medium.require_writable = lambda: None  # type: ignore[method-assign]
            medium.is_full = True
            with pytest.raises(StorageUnavailable, match="No space left"):
                await run.reshard(3)
            medium.is_full = False
            await run.refresh()
            assert (run.epoch, run.count) == (1, 2)
            await push(run, claim_of(lease, "two", 1))
            assert [await pull(run.shard(index)) for index in range(2)] == [(2, 2.0)] * 2

    run_async(work)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("keeps", [None, "/closed/"])
def test_a_record_of_an_orderly_end_that_cannot_be_removed_does_not_count(
    store: str, tmp_path: Path, shards: int, keeps: str | None
) -> None:
    """The next opening but one would take the run for being there still, without what came after."""

    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await new_run(registry, shards=shards)
            await push(run, claim_of(await lease_of(run), "one"))
        medium.keeps = keeps
        async with process(store, tmp_path / "data", storage=medium) as registry:
            run = await registry.find("run")
            await lease_of(run)
            assert run.epoch == (1 if keeps is None else 2)
            assert [await pull(run.shard(index)) for index in range(shards)] == [(1, 1.0)] * shards

    run_async(work)
