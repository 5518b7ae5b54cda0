"""Bodies that are refused while Redis is away: whoever is told so may rely on the push's units being open again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep.api.data import DataSpec
from freestep.errors import CoordinatorUnavailable, NonFiniteGradient, UnitNotHeld
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.runs.run import Run
from in_process import NUMEL, claim_of, lease_of, new_run, part_of, process, run_async


def lose_discard(run: Run, *, is_made: bool) -> None:
    """Has the next discard of a push be lost, or its answer if it is made."""
    pushes = run.coordinator.pushes
    discard = pushes.discard

    async def losing(*args: Any) -> None:
        pushes.discard = discard  # type: ignore[method-assign]
        if is_made:
            await discard(*args)
        raise CoordinatorUnavailable("it was lost")

    pushes.discard = losing  # type: ignore[method-assign]


@pytest.mark.parametrize("is_made", [True, False], ids=["answer", "call"])
@pytest.mark.parametrize("shards", [1, 2])
def test_units_are_open_again_once_the_refusal_is_told(store: str, tmp_path: Path, shards: int, is_made: bool) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards)
            await run.data.create(NewDataSet("train", DataSpec(length=2, unit=1)))
            lease, other = await lease_of(run), await lease_of(run, "other")
            await run.data.claim(lease.lease, lease.token, "train", 1)
            claim, gradient = replace(claim_of(lease, "key"), units={"train": (0,)}), torch.zeros(NUMEL)
            gradient[0] = torch.nan
            others = [
                asyncio.create_task(run.shard(shard).push(claim, part_of(run, shard, gradient)))
                for shard in range(1, shards)
            ]
            lose_discard(run, is_made=is_made)
            with pytest.raises(CoordinatorUnavailable):
                await run.shard(0).push(claim, part_of(run, 0, gradient))
            with pytest.raises((NonFiniteGradient, UnitNotHeld)):
                await run.shard(0).push(claim, part_of(run, 0, gradient))
            for refused in await asyncio.gather(*others, return_exceptions=True):
                assert isinstance(refused, NonFiniteGradient | UnitNotHeld)
            claimed = await run.data.claim(other.lease, other.token, "train", 2)
            assert [unit.unit for unit in claimed.units] == [0, 1]

    run_async(work)
