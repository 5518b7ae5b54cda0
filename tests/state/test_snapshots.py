"""Snapshots: what a reader holds does not change, and all memory comes back, in whatever order readers come and go."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from freestep.api.models import RunSpec
from freestep.errors import Overloaded, ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.state.bodies import room
from freestep_service.state.buffers import VectorPool
from freestep_service.state.compute import HOST, DeviceLocks
from freestep_service.state.log import Entry
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.state.shard import Shard
from freestep_service.state.snapshots import PointBody, Snapshots
from freestep_service.state.writer import Writer

NUMEL = 4
FLOOR = 1e9
"""No peer is as fast as that: after the grace every reader counts as slow."""


class Counting:
    """A shard that counts its steps in every element of y, and its snapshots."""

    def __init__(self, capacity: int = 2, reserve: MemoryBudget | None = None) -> None:
        spec = RunSpec.model_validate(
            {
                "optimizer": {"algorithm": "sgd", "lr": 1.0},
                "aggregation": {"policy": "async"},
                "parameters": [{"name": "w", "shape": [NUMEL]}],
            }
        )
        manifest = Manifest(spec.parameters)
        self.shard = Shard(spec, manifest, HOST, room(manifest))
        self.shard.initialize(torch.zeros(NUMEL), epoch=1)
        self.writer = Writer(self.shard, "test", DeviceLocks(NUMEL))
        self.writer.resume(1, 0, 0)
        self.pool = VectorPool(NUMEL, capacity, room(manifest), reserve=reserve)
        self.snapshots = Snapshots("run", self.writer, self.pool)

    async def step(self) -> None:
        seq = self.writer.taken_seq + 1
        await self.writer.submit(Entry(seq, 1, advance=True, gradient=torch.full((NUMEL,), -1.0)))


def value(body: PointBody, dtype: str) -> float:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    values = torch.frombuffer(bytearray(body.data), dtype=kinds[dtype])
    assert (values == values[0]).all()
    return float(values[0])


def run(work: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


OPERATIONS = st.tuples(
    st.sampled_from(["step", "read", "leave", "look"]),
    st.sampled_from(["x", "y", "z"]),
    st.sampled_from(["F32", "BF16", "F16"]),
    st.integers(0, 9),
)


LEFT_WHILE_MADE = [
    ("read", "x"), ("read", "y"), ("step", "x"), ("read", "x"), ("leave", "x"), ("leave", "x"), ("step", "x")
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=40), st.integers(1, 3), st.integers(0, 3))
@example([(each, point, "F32", 0) for each, point in LEFT_WHILE_MADE], 2, 0)
def test_what_a_reader_holds_does_not_change(
    operations: list[tuple[str, Any, str, int]], capacity: int, spare: int
) -> None:
    async def work() -> None:
        reserve = MemoryBudget(10**6 if spare else 0)
        counting = Counting(capacity, reserve)
        held: list[tuple[AsyncExitStack, PointBody, str]] = []
        for what, point, dtype, which in operations:
            match what:
                case "step":
                    await counting.step()
                case "read":
                    stack = AsyncExitStack()
                    try:
                        snapshot = await counting.snapshots.newest(point, dtype, 0.0 if not spare else 1.0)
                    except Overloaded:
                        continue
                    body = await stack.enter_async_context(counting.snapshots.reading(snapshot, FLOOR))
                    # Never older than what was applied when it was asked for.
                    assert body.step == counting.writer.applied_step
                    held.append((stack, body, dtype))
                case "leave" if held:
                    stack, _, _ = held.pop(which % len(held))
                    await stack.aclose()
                case "look":
                    counting.pool._look()
            for _, body, dtype in held:
                assert value(body, dtype) == body.step
        for stack, _, _ in held:
            await stack.aclose()
        # One that nobody waits for any more may still be made.
        await asyncio.gather(*counting.snapshots._making.values(), return_exceptions=True)
        free = []
        for _ in range(capacity):
            vector = counting.snapshots._recycle(("x", "F32"))
            assert vector is not None
            free.append(vector)
        assert counting.snapshots._recycle(("x", "F32")) is None
        assert len({id(vector) for vector in free}) == capacity
        assert reserve.free == reserve.total
        await counting.writer.close()

    run(work)


def test_readers_of_one_step_share_a_snapshot() -> None:
    async def work() -> None:
        counting = Counting()
        first = await counting.snapshots.newest("x", "F32", 30)
        assert await counting.snapshots.newest("x", "F32", 30) is first
        await counting.step()
        assert await counting.snapshots.newest("x", "F32", 30) is not first
        await counting.writer.close()

    run(work)


def test_no_snapshot_is_taken_of_a_state_that_an_update_has_damaged() -> None:
    async def work() -> None:
        counting = Counting(capacity=1)

        def fail(_: Entry) -> None:
            raise RuntimeError("out of memory")

        counting.shard.apply = fail  # type: ignore[method-assign]
        with pytest.raises(ShardUnavailable):
            await counting.step()
        for _ in range(3):
            with pytest.raises(ShardUnavailable):
                await counting.snapshots.newest("y", "F32", 30)
        # The memory that it was to lie in came back.
        assert counting.pool.try_acquire() is not None
        await counting.writer.close()

    run(work)
