"""Copies of whole states, and the memory that is counted for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from freestep.api.control import ControlRequest
from in_process import new_run, process, run_async, until

POLICIES = {"async": {"policy": "async"}, "buffered": {"policy": "buffered", "batch": 2}}


@pytest.mark.parametrize(("before", "meanwhile"), [("async", "buffered"), ("buffered", "async")])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_counted_for_a_copy_is_given_back_whatever_the_policy_has_become(
    store: str, tmp_path: Path, shards: int, before: str, meanwhile: str
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            run = await new_run(registry, shards=shards, aggregation=POLICIES[before])
            memory = run._context.resources.memory
            free = memory.free
            async with run.shard(0).read_state("", 1):
                assert memory.free < free
                await run.controls.change(ControlRequest(aggregation=POLICIES[meanwhile]), "", "a test")
            await run.controls.change(ControlRequest(aggregation={"batch": None, **POLICIES[before]}), "", "a test")
            await until(lambda: memory.free == free, "what was counted")

    run_async(work)
